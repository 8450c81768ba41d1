"""A step that updates within the backward pass does what one that updates after it does."""

from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fabric_jax.data.batch import Batch
from fabric_jax.errors import FabricError
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderDefinition, DecoderOptions, define_decoder
from fabric_jax.models.initialize import initialize_adapter, initialize_base
from fabric_jax.models.registry import get_config
from fabric_jax.training.config import OptimizerConfig, check_fused
from fabric_jax.training.optimizer import make_optimizer
from fabric_jax.training.step import TrainState, init_state, make_train_step

LENGTH = 12
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.2, weight_decay=0.1, clip_norm=0.0)


def small(name: str) -> ModelConfig:
    config = replace(get_config(name), num_layers=3, hidden_size=32, ffn_size=48, vocab_size=61)
    return replace(config, num_heads=2, num_kv_heads=1, head_dim=16)


def define(name: str, **lora: Any) -> DecoderDefinition:
    config = small(name)
    return define_decoder(
        config,
        DecoderOptions(
            mode="packed" if config.ternary else "float",
            remat="layer",
            lora=LoraConfig(rank=3, **lora),
        ),
    )


def random_batch(seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    shape = (1, 2, LENGTH)
    segments = np.broadcast_to(np.repeat([1, 2, 0], [6, 4, 2]), shape)
    return Batch(
        tokens=jnp.asarray(rng.integers(0, 61, shape), jnp.int32),
        targets=jnp.asarray(rng.integers(0, 61, shape), jnp.int32),
        loss_mask=jnp.asarray((rng.random(shape) < 0.6) & (segments > 0), jnp.float32),
        segment_ids=jnp.asarray(segments, jnp.int32),
        positions=jnp.asarray(np.broadcast_to(np.arange(LENGTH), shape), jnp.int32),
    )


def run(
    definition: DecoderDefinition, config: OptimizerConfig, *, fused: bool
) -> tuple[TrainState, list[tuple[float, float]]]:
    optimizer = make_optimizer(config, 8)
    base = initialize_base(definition, 0)
    state = init_state(initialize_adapter(definition, 0), optimizer)
    step = make_train_step(definition, optimizer, fused=fused)
    seen: list[tuple[float, float]] = []
    for seed in range(4):
        state, metrics = step(state, base, random_batch(seed), jax.random.key(3))
        seen.append((float(metrics.loss), float(metrics.grad_norm)))
    return state, seen


@pytest.mark.parametrize(
    ("name", "lora", "moments"),
    [
        ("bitnet-tiny", {}, "float32"),
        ("bitnet-tiny", {"targets": ("q", "down"), "dropout": 0.2}, "float32"),
        ("bitnet-tiny", {}, "int8"),
        ("gemma-3-1b", {}, "float32"),
    ],
)
@pytest.mark.slow
def test_both_steps_train_alike(
    name: str, lora: dict[str, Any], moments: Literal["float32", "int8"]
) -> None:
    definition = define(name, **lora)
    config = replace(OPTIMIZER, moments=moments)
    (after, losses), (within, fused) = (
        run(definition, config, fused=fused) for fused in (False, True)
    )
    np.testing.assert_allclose(fused, losses, rtol=2e-5)
    assert jax.tree.structure(after) == jax.tree.structure(within)
    for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(within), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
    for one, other in zip(
        jax.tree.leaves(after.params), jax.tree.leaves(within.params), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def compiled(fused: bool, layers: int) -> jax.stages.Compiled:
    config = replace(small("bitnet-tiny"), num_layers=layers)
    options = DecoderOptions(remat="layer", lora=LoraConfig(rank=16))
    definition = define_decoder(config, options)
    optimizer = make_optimizer(OPTIMIZER, 8)
    state = jax.eval_shape(lambda p: init_state(p, optimizer), nnx.to_pure_dict(definition.adapter))
    step = make_train_step(definition, optimizer, fused=fused)
    base = nnx.to_pure_dict(definition.base)
    return step.lower(state, base, random_batch(0), jax.random.key(0)).compile()  # pyright: ignore[reportArgumentType]


def test_the_gradients_of_all_layers_never_exist_at_once() -> None:
    """What temporaries grow by from 8 to 40 layers is the layers' inputs and no gradient."""
    growth = {}
    for fused in (False, True):
        few, many = (compiled(fused, layers).memory_analysis() for layers in (8, 40))
        growth[fused] = (many.temp_size_in_bytes - few.temp_size_in_bytes) / 32
    shapes = small("bitnet-tiny").linear_shapes.values()
    gradient = 4 * 16 * sum(n + k for n, k in shapes)
    inputs = 4 * 2 * LENGTH * 32
    assert growth[True] < inputs + gradient / 4
    assert growth[False] > gradient


def test_the_state_is_updated_in_place() -> None:
    step = compiled(True, 8)
    analysis = step.memory_analysis()
    # Everything comes back in the buffers it came in; only metrics are new.
    assert analysis.output_size_in_bytes - analysis.alias_size_in_bytes < 1024


def test_several_micro_batches_are_refused() -> None:
    definition = define("bitnet-tiny")
    optimizer = make_optimizer(OPTIMIZER, 8)
    state = init_state(initialize_adapter(definition, 0), optimizer)
    two = jax.tree.map(lambda x: jnp.concatenate([x, x]), random_batch(0))
    with pytest.raises(ValueError, match="one micro-batch"):
        make_train_step(definition, optimizer, fused=True)(
            state, initialize_base(definition, 0), two, jax.random.key(0)
        )


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"clip_norm": 1.0}, "clip_norm"),
        ({"remat": "linears"}, "remat"),
        ({"a": 2}, "accum"),
        ({"nonfinite": "skip"}, "nonfinite"),
    ],
)
def test_what_needs_all_gradients_is_refused(change: dict[str, Any], name: str) -> None:
    optimizer = replace(OPTIMIZER, clip_norm=change.get("clip_norm", 0.0))
    with pytest.raises(FabricError, match=name):
        check_fused(
            optimizer,
            change.get("remat", "layer"),
            change.get("a", 1),
            change.get("nonfinite", "stop"),
        )
