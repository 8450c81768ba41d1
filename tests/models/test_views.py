"""What global and local layers see, against the definition, token by token."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric_jax.layers.rope import RopeScaling, rotary_angles
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.registry import get_config
from fabric_jax.models.views import cache_views, row_views

T = 12
PLAIN = get_config("bitnet-tiny")


def local_config(window: int, every: int) -> ModelConfig:
    return replace(PLAIN, sliding_window=window, global_every=every)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_masks_of_rows(data: st.DataObject) -> None:
    window = data.draw(st.integers(1, T + 1))
    cuts = data.draw(st.lists(st.booleans(), min_size=T, max_size=T))
    segments = np.cumsum(cuts).astype(np.int32)[None]
    positions = jnp.arange(T, dtype=jnp.int32)[None]
    views = row_views(local_config(window, 2), positions, jnp.asarray(segments))
    assert views.of_local is not None
    for t, s in np.ndindex(T, T):
        seen = s <= t and segments[0, s] == segments[0, t]
        assert bool(views.of_global.mask[0, t, s]) == seen
        assert bool(views.of_local.mask[0, t, s]) == (seen and t - s < window)


@pytest.mark.parametrize("window", [1, 3, 20])
def test_masks_of_a_cache(window: int) -> None:
    positions = np.array([[0, 1, 2], [7, 8, 9]], np.int32)
    views = cache_views(local_config(window, 3), jnp.asarray(positions), T)
    assert views.of_local is not None
    for b, t, s in np.ndindex(2, 3, T):
        behind = positions[b, t] - s
        assert bool(views.of_global.mask[b, t, s]) == (behind >= 0)
        assert bool(views.of_local.mask[b, t, s]) == (0 <= behind < window)


def test_the_last_of_every_few_layers_is_global() -> None:
    config = replace(
        local_config(2, 3),
        num_layers=7,
        local_rope_theta=500.0,
        rope_scaling=RopeScaling(kind="linear", factor=2.0),
    )
    positions = jnp.arange(T, dtype=jnp.int32)[None]
    views = row_views(config, positions, jnp.ones((1, T), jnp.int32))
    scaled = rotary_angles(positions, config.head_dim, config.rope_theta, config.rope_scaling)
    local = rotary_angles(positions, config.head_dim, 500.0)
    for layer in range(config.num_layers):
        view = jax.jit(views.at)(jnp.int32(layer))
        is_global = layer in (2, 5)
        assert config.is_global(layer) == is_global
        assert bool(view.mask[0, -1, 0]) == is_global
        for found, expected in zip(view.angles, scaled if is_global else local, strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_a_model_without_local_layers_selects_nothing() -> None:
    positions = jnp.arange(T, dtype=jnp.int32)[None]
    for views in (
        row_views(PLAIN, positions, jnp.ones((1, T), jnp.int32)),
        cache_views(PLAIN, positions, T),
    ):
        assert views.of_local is None
        assert views.at(jnp.int32(1)) is views.of_global


@pytest.mark.parametrize(
    ("config", "tables"), [(PLAIN, 1), (local_config(4, 2), 2)], ids=["uniform", "local"]
)
def test_tables_are_made_once_and_not_in_the_scan(config: ModelConfig, tables: int) -> None:
    definition = define_decoder(config, DecoderOptions())
    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    run = jax.make_jaxpr(lambda base, *ids: definition.bind(base, {})(*ids))
    jaxpr = run(nnx.to_pure_dict(definition.base), ids, ids, ids).jaxpr
    scan = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
    assert sum(eqn.primitive.name == "cos" for eqn in jaxpr.eqns) == tables
    body = str(scan.params["jaxpr"])
    assert "name=linear" in body
    assert " cos " not in body
