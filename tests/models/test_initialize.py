"""Random weights are made in their final format, reproducibly, each tensor from its own key."""

import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fabric_jax.errors import FabricError
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.decoder import DecoderDefinition, DecoderOptions, define_decoder
from fabric_jax.models.initialize import initialize_adapter, initialize_base
from fabric_jax.models.registry import get_config

TINY = replace(get_config("bitnet-tiny"), num_layers=3, hidden_size=48, num_heads=6, head_dim=8)
TINY = replace(TINY, num_kv_heads=2, ffn_size=80, vocab_size=61)


def define(**options: object) -> DecoderDefinition:
    return define_decoder(TINY, replace(DecoderOptions(), **options))


@pytest.mark.parametrize("mode", ["packed", "master", "float"])
def test_shapes_and_dtypes_are_the_declared_ones(mode: str) -> None:
    definition = define(mode=mode, dtype="bfloat16", lora=LoraConfig(rank=2))
    pairs = [
        (initialize_base(definition, 0), definition.base),
        (initialize_adapter(definition, 0), definition.adapter),
    ]
    for made, declared in pairs:
        made_leaves = jax.tree.leaves(made)
        declared_leaves = jax.tree.leaves(declared)
        assert len(made_leaves) == len(declared_leaves)
        for found, like in zip(made_leaves, declared_leaves, strict=True):
            assert (found.shape, found.dtype) == (like.shape, like.dtype)


@pytest.mark.parametrize("mode", ["packed", "master"])
def test_seeds_reproduce_and_differ(mode: str) -> None:
    definition = define(mode=mode)
    first, again, other = (initialize_base(definition, seed) for seed in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    q = ("layers", "attention", "q", "weight")
    assert not np.array_equal(_leaf(first, q), _leaf(other, q))


def test_tensors_and_layers_are_independent() -> None:
    base = initialize_base(define(mode="master"), 0)
    q = np.asarray(_leaf(base, ("layers", "attention", "q", "weight")))
    o = np.asarray(_leaf(base, ("layers", "attention", "o", "weight")))
    for one, other in ((q[0], q[1]), (q[0], o[0]), (q[1], q[2])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(one.size)


def test_a_fresh_adapter_changes_nothing() -> None:
    definition = define(lora=LoraConfig(rank=4))
    base, adapter = initialize_base(definition, 0), initialize_adapter(definition, 0)
    tokens = jnp.arange(12, dtype=jnp.int32)[None] % 61
    arguments = (tokens, jnp.arange(12, dtype=jnp.int32)[None], jnp.ones((1, 12), jnp.int32))
    with jax.disable_jit():
        with_adapter = definition.bind(base, adapter)(*arguments)
        without = define().bind(base, {})(*arguments)
    np.testing.assert_array_equal(with_adapter, without)
    assert float(jnp.abs(_leaf(adapter, ("layers", "attention", "q", "lora", "a"))).max()) > 0


def test_a_float_model_has_no_packed_form() -> None:
    with pytest.raises(FabricError, match=r"is not a ternary model.*found the mode 'packed'"):
        define_decoder(replace(TINY, ternary=False), DecoderOptions(mode="packed"))


RESIDENT = """
import resource, sys
from dataclasses import replace
import jax
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.initialize import initialize_base
from fabric_jax.models.registry import get_config

small = replace(get_config("bitnet-tiny"), num_layers=2)
jax.block_until_ready(initialize_base(define_decoder(small, DecoderOptions()), 0))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
config = replace(get_config("bitnet-1b"), num_layers=8, vocab_size=4096)
base = jax.block_until_ready(initialize_base(define_decoder(config, DecoderOptions()), 0))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(1024 * (after - before), sum(leaf.nbytes for leaf in jax.tree.leaves(base)))
print(config.linear_parameters, max(n * k for n, k in config.linear_shapes.values()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts KiB on Linux only")
def test_no_float_copy_is_made_on_the_way() -> None:
    """Peak resident memory: what is kept, and scratch of a few bytes a weight of one matrix."""
    result = subprocess.run(
        [sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True, timeout=300
    )
    grown, kept, weights, largest = map(int, result.stdout.split())
    assert kept < weights  # the packed model with its small embedding, not one byte a weight
    assert grown < kept + 8 * largest + (48 << 20)
    assert grown < 2 * weights


def _leaf(tree: dict[str, object], path: tuple[str, ...]) -> jax.Array:
    node: object = tree
    for name in path:
        assert isinstance(node, dict)
        node = node[name]
    assert isinstance(node, jax.Array)
    return node
