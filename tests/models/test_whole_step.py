"""Decoding through all layers in one launch, as a decoder's option."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels.decoding import api
from flax import nnx

from fabric_jax.errors import FabricError
from fabric_jax.layers.kv_cache import empty_cache
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.initialize import initialize_base
from fabric_jax.models.registry import get_config
from tests.kernels.conftest import need_cpu_kernels


def options_of(named: dict[str, Any]) -> DecoderOptions:
    """With Triton's kernels where none are named."""
    given: dict[str, Any] = {"implementation": "triton", **named}
    return DecoderOptions(**given)


def step(base: Any, rows: int = 1, **options: Any) -> tuple[jax.Array, Any]:
    config = get_config("bitnet-tiny")
    definition = define_decoder(config, options_of(options))
    adapter = nnx.to_pure_dict(definition.adapter)
    cache = empty_cache(config.num_layers, rows, 8, config.num_kv_heads, config.head_dim, "float32")

    def run(base: Any, cache: Any) -> Any:
        tokens = jnp.arange(3, 3 + rows, dtype=jnp.int32)[:, None]
        return definition.bind(base, adapter).extend(tokens, jnp.zeros_like(tokens), cache)

    return jax.jit(run)(base, cache)


def test_equals_layer_by_layer() -> None:
    config = get_config("bitnet-tiny")
    base = initialize_base(define_decoder(config, DecoderOptions()), 0)
    (found, ours), (expected, theirs) = step(base, whole_step=True), step(base)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(ours.keys, theirs.keys, atol=1e-4)


@pytest.mark.parametrize("packing", ["ternary2", "ternary1.6"])
def test_has_the_bits_of_layer_by_layer_on_cpu(packing: Any) -> None:
    need_cpu_kernels()
    config = get_config("bitnet-tiny")
    options: dict[str, Any] = {"implementation": "cpu", "packing": packing}
    base = initialize_base(define_decoder(config, DecoderOptions(packing=packing)), 0)
    for rows in (1, 3):
        found = step(base, rows, whole_step=True, **options)
        expected = step(base, rows, whole_step=False, **options)
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def loops(rows: int, **options: Any) -> bool:
    """Whether the program goes layer by layer."""
    config = get_config("bitnet-tiny")
    definition = define_decoder(config, options_of(options))
    base, adapter = definition.base, nnx.to_pure_dict(definition.adapter)
    shape = (config.num_layers, rows, 8, config.num_kv_heads, config.head_dim)
    cache = jax.eval_shape(lambda: empty_cache(*shape, "float32"))
    tokens = jax.ShapeDtypeStruct((rows, 1), jnp.int32)

    def run(base: Any, cache: Any, tokens: jax.Array) -> Any:
        return definition.bind(base, adapter).extend(tokens, tokens, cache)

    return "scan[" in str(jax.make_jaxpr(run)(nnx.to_pure_dict(base), cache, tokens))


def test_is_chosen_for_one_token_on_cpu() -> None:
    need_cpu_kernels()
    assert not loops(1, implementation=None)
    assert not loops(1, implementation="cpu")
    assert not loops(1, implementation="cpu", packing="ternary1.6")
    assert loops(1, implementation="xla")
    assert loops(2, implementation="cpu")
    assert loops(1, implementation="cpu", whole_step=False)
    assert loops(1, implementation="cpu", dtype="bfloat16")
    assert loops(1, implementation="cpu", lora=LoraConfig(rank=4))


def test_is_chosen_for_one_token_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is pretended, the program is traced for it."""
    assert loops(1)
    monkeypatch.setattr(api, "compute_capability", lambda: api.HOPPER)
    assert not loops(1)
    assert loops(2)
    assert loops(1, whole_step=False)
    assert loops(1, lora=LoraConfig(rank=4))


@pytest.mark.parametrize(
    ("options", "rows", "reason"),
    [
        ({"lora": LoraConfig(rank=4)}, 1, "packed ones alone"),
        ({"act_quant": "none"}, 1, "another quantiser"),
        ({"packing": "ternary1.6"}, 1, "ternary2"),
        ({}, 5, "5 rows"),
    ],
)
def test_says_what_it_does_not_take(options: dict[str, Any], rows: int, reason: str) -> None:
    config = get_config("bitnet-tiny")
    definition = define_decoder(config, DecoderOptions(**options))
    base = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nnx.to_pure_dict(definition.base))
    with pytest.raises(FabricError, match=reason):
        step(base, rows, whole_step=True, **options)
