"""A step of decoding whose layers follow one another, against a loop over them; when it is so."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fabric_jax.layers.kv_cache import empty_cache
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.decoding import writes_layers_out
from fabric_jax.models.initialize import initialize_adapter, initialize_base
from fabric_jax.models.registry import get_config

TINY = get_config("bitnet-tiny")


@pytest.mark.parametrize("rank", [0, 2])
def test_equals_the_loop(rank: int) -> None:
    outputs: list[Any] = []
    for unroll in (False, True):
        options = DecoderOptions(implementation="xla", lora=LoraConfig(rank=rank), unroll=unroll)
        definition = define_decoder(TINY, options)
        base = initialize_base(definition, 0)
        adapter = jax.tree.map(lambda a: a + 0.05, initialize_adapter(definition, 1))
        cache = empty_cache(TINY.num_layers, 3, 8, TINY.num_kv_heads, TINY.head_dim, "float32")
        tokens = jnp.asarray([[3], [4], [5]], jnp.int32)
        decoder = definition.bind(base, adapter)
        outputs.append(decoder.extend(tokens, jnp.zeros_like(tokens), cache))
    for one, other in zip(*map(jax.tree.leaves, outputs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ((8, 1), {}, True),
        ((8, 2), {}, False),
        ((8, 1), {"lora": LoraConfig(rank=2)}, False),
        ((8, 1), {"implementation": "xla"}, False),
        ((8, 1), {"mode": "master"}, False),
        ((8, 1), {"mode": "float"}, False),
    ],
)
def test_is_for_kernels_that_read_stacks(
    shape: tuple[int, int],
    options: dict[str, Any],
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of anything else a layer would be cut out for every step, or all of them before."""
    given: dict[str, Any] = {"implementation": "triton", **options}
    definition = define_decoder(TINY, DecoderOptions(**given))
    trees = [nnx.to_pure_dict(state) for state in (definition.base, definition.adapter)]
    found: list[bool] = []

    def run(base: Any, adapter: Any) -> jax.Array:
        layers = definition.bind(base, adapter).layers
        found.append(writes_layers_out(layers, shape))
        return jnp.zeros(())

    jax.eval_shape(run, *trees)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.eval_shape(lambda *trees: run(*trees), *trees)
    assert found == [False, expected]
