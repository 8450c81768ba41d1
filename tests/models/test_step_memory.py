"""What XLA allocates for a LoRA step on packed weights: never the stack in another format."""

import re
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from fabric_kernels import Packing
from flax import nnx

from fabric_jax.data.batch import Batch
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.initialize import initialize_adapter, initialize_base
from fabric_jax.models.registry import get_config
from fabric_jax.training.config import OptimizerConfig
from fabric_jax.training.optimizer import make_optimizer
from fabric_jax.training.step import init_state, make_train_step

DEEP = 24
TOKENS = 4
REMATS = ["none", "linears", "int8-residuals", "layer", "offload"]
# Instructions that hold or pass on a buffer that is there already.
PASSING = {"parameter", "get-tuple-element", "tuple", "while", "bitcast"}


def deep_narrow(layers: int) -> ModelConfig:
    """Weights outweigh the activations of a few tokens, and a stack outweighs a layer."""
    return replace(
        get_config("bitnet-tiny"),
        num_layers=layers,
        hidden_size=512,
        ffn_size=1536,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
        vocab_size=64,
    )


def weights_of_a_layer(config: ModelConfig) -> int:
    return config.linear_parameters // config.num_layers


def shapes(state: nnx.State[Any, Any]) -> Any:
    plain = nnx.to_pure_dict(state)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), plain)


def size(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@cache
def compiled_step(
    layers: int, remat: str, packing: Packing = "ternary2"
) -> tuple[jax.stages.Compiled, Any]:
    """The compiled step, and the shapes of its state."""
    options = replace(DecoderOptions(lora=LoraConfig(rank=2)), remat=remat, packing=packing)
    definition = define_decoder(deep_narrow(layers), options)
    optimizer = make_optimizer(OptimizerConfig(), 10)
    state = jax.eval_shape(lambda p: init_state(p, optimizer), shapes(definition.adapter))
    ids = jax.ShapeDtypeStruct((1, 1, TOKENS), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 1, TOKENS), jnp.float32)
    batch = Batch(tokens=ids, targets=ids, loss_mask=mask, segment_ids=ids, positions=ids)
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = make_train_step(definition, optimizer)
    return step.lower(state, shapes(definition.base), batch, key).compile(), state


@pytest.mark.parametrize("remat", REMATS)
def test_temporaries_stay_under_twice_the_largest_layer(remat: str) -> None:
    """A layer counts with its seven matrices in float32; the packed stack of 24 is 1.5 of those.

    The bound holds everything: activations of the 4 tokens, gradients and updates of the adapter.
    """
    compiled, _ = compiled_step(DEEP, remat)
    layer = 4 * weights_of_a_layer(deep_narrow(DEEP))
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * layer


@pytest.mark.parametrize("remat", REMATS)
def test_a_further_layer_costs_no_copy_of_its_weights(remat: str) -> None:
    """What temporaries grow by from 8 to 24 layers is less than half of the packed bytes."""
    few, many = (compiled_step(layers, remat)[0].memory_analysis() for layers in (8, DEEP))
    growth = (many.temp_size_in_bytes - few.temp_size_in_bytes) / (DEEP - 8)
    assert growth < weights_of_a_layer(deep_narrow(DEEP)) / 4 / 2


@pytest.mark.parametrize(
    ("remat", "packing"), [*((remat, "ternary2") for remat in REMATS), ("linears", "ternary1.6")]
)
def test_no_instruction_makes_a_stack_of_matrices(remat: str, packing: Packing) -> None:
    """Neither packed, nor as integers, nor as floats."""
    compiled, _ = compiled_step(DEEP, remat, packing)
    config = deep_narrow(DEEP)
    smallest = min(n * k for n, k in config.linear_shapes.values()) // 5
    pattern = re.compile(r"%?\S+ = (\w+)\[(\d+(?:,\d+)*)\]\S* ([\w-]+)\(")
    seen, made = 0, []
    for line in compiled.as_text().splitlines():
        match = pattern.search(line)
        if match is None:
            continue
        dims = [int(n) for n in match[2].split(",")]
        elements = 1
        for n in dims:
            elements *= n
        if dims[0] != DEEP or elements < DEEP * smallest:
            continue
        seen += 1
        if match[3] not in PASSING:
            made.append(line.strip())
    assert seen >= 7, "the packed stacks were not found in the program"
    assert not made


def test_the_search_for_stacks_finds_one() -> None:
    """The bound on growth is one that a program with a copy of the stack breaks."""
    layers, n = DEEP, 512
    packed = jax.ShapeDtypeStruct((layers, n, n // 4), jnp.uint8)

    def with_copy(packed: jax.Array, x: jax.Array) -> jax.Array:
        stack = packed.astype(jnp.float32) * 2
        return jax.lax.scan(lambda h, w: (jnp.sin(h @ w).repeat(4, 0)[:n], None), x, stack)[0]

    compiled = jax.jit(with_copy).lower(packed, jax.ShapeDtypeStruct((n,), jnp.float32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes > layers * n * n // 4 / 2


def test_the_state_is_donated_whole() -> None:
    compiled, state = compiled_step(DEEP, "layer")
    assert compiled.memory_analysis().alias_size_in_bytes >= size(state)


def test_a_step_consumes_its_state_and_leaves_the_base_alone() -> None:
    config = replace(get_config("bitnet-tiny"), num_layers=2, hidden_size=32, ffn_size=48)
    config = replace(config, num_heads=2, num_kv_heads=2, head_dim=16, vocab_size=29)
    definition = define_decoder(config, DecoderOptions(lora=LoraConfig(rank=2)))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), 100)
    base = initialize_base(definition, 0)
    state = init_state(initialize_adapter(definition, 0), optimizer)
    tokens = (jnp.arange(8, dtype=jnp.int32) * 7 % 29).reshape(1, 1, 8)
    batch = Batch(
        tokens=tokens,
        targets=jnp.roll(tokens, -1),
        loss_mask=jnp.ones((1, 1, 8), jnp.float32),
        segment_ids=jnp.ones((1, 1, 8), jnp.int32),
        positions=jnp.arange(8, dtype=jnp.int32).reshape(1, 1, 8),
    )
    step = make_train_step(definition, optimizer)
    losses = []
    for _ in range(8):
        before = state
        state, metrics = step(state, base, batch, jax.random.key(0))
        losses.append(float(metrics.loss))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
    assert losses[-1] < losses[0]
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(base))
