"""One optimizer step: what it changes, what it leaves, and that batches add up."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fabric_jax.data.batch import Batch
from fabric_jax.evaluation.perplexity import make_eval_step
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.decoder import DecoderDefinition, define_decoder
from fabric_jax.models.initialize import Tree, initialize_adapter, initialize_base
from fabric_jax.training.config import OptimizerConfig
from fabric_jax.training.optimizer import make_optimizer
from fabric_jax.training.step import TrainState, init_state, make_train_step

pytestmark = [pytest.mark.usefixtures("compiled_once"), pytest.mark.xdist_group("training")]

LENGTH = 16
SETTINGS = OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.0)


def random_batch(seed: int, micro_batches: int, rows: int) -> Batch:
    """Rows [A, B, T] of two documents and padding; about half of the targets are trained on."""
    rng = np.random.default_rng(seed)
    shape = (micro_batches, rows, LENGTH)
    segments = np.broadcast_to(np.repeat([1, 2, 0], [7, 6, 3]), shape)
    positions = np.broadcast_to(np.concatenate([range(7), range(6), range(3)]), shape)
    mask = (rng.random(shape) < 0.5) & (segments > 0)
    return Batch(
        tokens=jnp.asarray(rng.integers(0, 256, shape), jnp.int32),
        targets=jnp.asarray(rng.integers(0, 256, shape), jnp.int32),
        loss_mask=jnp.asarray(mask, jnp.float32),
        segment_ids=jnp.asarray(segments, jnp.int32),
        positions=jnp.asarray(positions, jnp.int32),
    )


@pytest.fixture(scope="module")
def base(micro_definition: DecoderDefinition) -> Tree:
    return initialize_base(micro_definition, 0)


def trained_adapter(definition: DecoderDefinition) -> Tree:
    """An adapter whose B is not zero, so that every leaf has a gradient."""
    adapter = initialize_adapter(definition, 0)
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x) + 0.1 * rng.normal(size=x.shape), x.dtype), adapter
    )


def copied(tree: Any) -> Any:
    """Arrays that a step may consume."""
    return jax.tree.map(jnp.copy, tree)


def reference_loss(
    definition: DecoderDefinition, base: Tree
) -> Callable[[Tree, Batch], tuple[jax.Array, Tree]]:
    """Loss and gradient by definition: the mean over the trainable tokens of all rows at once."""

    def loss(adapter: Tree, batch: Batch) -> jax.Array:
        flat = jax.tree.map(lambda x: x.reshape(-1, LENGTH), batch)
        decoder = definition.bind(base, adapter)
        logits = decoder.logits(decoder(flat.tokens, flat.positions, flat.segment_ids))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), flat.targets[..., None], axis=-1)
        return -jnp.sum(chosen[..., 0] * flat.loss_mask) / jnp.sum(flat.loss_mask)

    return jax.jit(jax.value_and_grad(loss))


def norm(tree: Any) -> float:
    return float(
        np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in jax.tree.leaves(tree)))
    )


def test_only_the_adapter_is_optimised(micro_definition: DecoderDefinition, base: Tree) -> None:
    optimizer = make_optimizer(SETTINGS, 10)
    adapter = trained_adapter(micro_definition)
    shapes = [leaf.shape for leaf in jax.tree.leaves(adapter)]
    before = jax.tree.map(lambda x: (x.unsafe_buffer_pointer(), np.array(x)), base)
    state = init_state(adapter, optimizer)
    moments = [leaf.shape for leaf in jax.tree.leaves(state.moments) if leaf.ndim > 0]
    assert sorted(moments) == sorted(shapes * 2)
    first = jax.tree.map(np.array, state.params)
    state, _ = make_train_step(micro_definition, optimizer)(
        state, base, random_batch(0, 2, 2), jax.random.key(0)
    )
    assert jax.tree.structure(state.params) == jax.tree.structure(first)
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), state.params, first)
    assert all(jax.tree.leaves(moved))
    pairs = zip(
        jax.tree.leaves(base),
        jax.tree.leaves(before, is_leaf=lambda x: isinstance(x, tuple)),
        strict=True,
    )
    for array, (pointer, value) in pairs:
        assert array.unsafe_buffer_pointer() == pointer
        np.testing.assert_array_equal(np.asarray(array), value)


def test_micro_batches_add_up_to_one_batch(micro_definition: DecoderDefinition, base: Tree) -> None:
    """The rows have different numbers of trainable tokens, so a mean of means would differ."""
    optimizer = make_optimizer(SETTINGS, 10)
    whole = random_batch(1, 1, 4)
    parts = jax.tree.map(lambda x: x.reshape(2, 2, LENGTH), whole)
    counts = np.asarray(parts.loss_mask).sum(axis=(1, 2))
    assert len(set(counts.tolist())) > 1
    step = make_train_step(micro_definition, optimizer)
    found = [
        step(init_state(trained_adapter(micro_definition), optimizer), base, b, jax.random.key(0))
        for b in (whole, parts)
    ]
    (one, one_metrics), (many, many_metrics) = found
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(many.params), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(one_metrics.loss, many_metrics.loss, rtol=1e-6)
    np.testing.assert_allclose(one_metrics.grad_norm, many_metrics.grad_norm, rtol=1e-4)
    assert many_metrics.trainable_tokens == counts.sum()
    assert many_metrics.real_tokens == 4 * 13


def test_each_step_uses_the_gradient_of_its_own_batch(
    micro_definition: DecoderDefinition, base: Tree
) -> None:
    """Nothing accumulates from step to step: loss and gradient are those of autodiff on the
    definition at that step's weights."""
    optimizer = make_optimizer(SETTINGS, 10)
    step = make_train_step(micro_definition, optimizer)
    reference = reference_loss(micro_definition, base)
    state = init_state(trained_adapter(micro_definition), optimizer)
    for number in range(5):
        batch = random_batch(number, 2, 2)
        loss, gradient = reference(state.params, batch)
        expected = float(loss), norm(gradient)
        state, metrics = step(state, base, batch, jax.random.key(0))
        np.testing.assert_allclose(float(metrics.loss), expected[0], rtol=1e-5)
        np.testing.assert_allclose(float(metrics.grad_norm), expected[1], rtol=1e-3)
        assert int(state.step) == number + 1


@pytest.mark.parametrize("trains", ["adapter", "base"])
def test_donated_state_is_reused_in_place(
    trains: Any, micro_definition: DecoderDefinition, base: Tree
) -> None:
    if trains == "base":
        options = replace(micro_definition.options, mode="master", lora=LoraConfig(rank=0))
        definition = define_decoder(micro_definition.config, options)
        params, frozen = initialize_base(definition, 0), {}
    else:
        definition, params, frozen = micro_definition, trained_adapter(micro_definition), base
    optimizer = make_optimizer(SETTINGS, 10)
    state = init_state(params, optimizer)
    step = make_train_step(definition, optimizer, trains=trains)
    compiled = step.lower(state, frozen, random_batch(0, 2, 2), jax.random.key(0)).compile()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes == size
    sizes = [leaf.nbytes for leaf in jax.tree.leaves((state, frozen, random_batch(0, 2, 2)))]
    # The frozen weights are arguments, not constants of the program.
    assert compiled.memory_analysis().argument_size_in_bytes >= sum(sizes)
    after, _ = compiled(state, frozen, random_batch(0, 2, 2), jax.random.key(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((after, frozen)))


def test_dropout_changes_from_step_to_step_and_repeats_with_the_key(
    micro_definition: DecoderDefinition, base: Tree
) -> None:
    options = replace(micro_definition.options, lora=LoraConfig(rank=4, dropout=0.5))
    definition = define_decoder(micro_definition.config, options)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.0), 10)
    step = make_train_step(definition, optimizer)
    batch, adapter = random_batch(0, 2, 2), trained_adapter(micro_definition)

    def losses(seed: int) -> list[float]:
        state, found = init_state(copied(adapter), optimizer), []
        for _ in range(3):
            state, metrics = step(state, base, batch, jax.random.key(seed))
            found.append(float(metrics.loss))
        return found

    first = losses(0)
    assert len(set(first)) == 3
    assert losses(0) == first
    assert set(losses(1)).isdisjoint(first)


def test_evaluation_is_without_dropout_and_matches_the_definition(
    micro_definition: DecoderDefinition, base: Tree
) -> None:
    options = replace(micro_definition.options, lora=LoraConfig(rank=4, dropout=0.5))
    definition = define_decoder(micro_definition.config, options)
    adapter, batch = trained_adapter(micro_definition), random_batch(0, 2, 2)
    flat = jax.tree.map(lambda x: x.reshape(-1, LENGTH), batch)
    loss, tokens = make_eval_step(definition)(base, adapter, flat)
    expected, _ = reference_loss(micro_definition, base)(adapter, batch)
    np.testing.assert_allclose(float(loss) / float(tokens), float(expected), rtol=1e-5)


def test_a_batch_without_trainable_tokens_changes_nothing_but_moments(
    micro_definition: DecoderDefinition, base: Tree
) -> None:
    optimizer = make_optimizer(SETTINGS, 10)
    adapter = trained_adapter(micro_definition)
    before = jax.tree.map(np.array, adapter)
    batch = replace(random_batch(0, 2, 2), loss_mask=jnp.zeros((2, 2, LENGTH)))
    state, metrics = make_train_step(micro_definition, optimizer)(
        init_state(adapter, optimizer), base, batch, jax.random.key(0)
    )
    assert isinstance(state, TrainState)
    assert float(metrics.loss) == 0.0
    assert float(metrics.grad_norm) == 0.0
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, state.params), before)


def test_bfloat16_adapters_move_by_float32_updates(
    micro_definition: DecoderDefinition, base: Tree
) -> None:
    options = replace(micro_definition.options, lora=LoraConfig(rank=4, adapter_dtype="bfloat16"))
    definition = define_decoder(micro_definition.config, options)
    optimizer = make_optimizer(SETTINGS, 10)
    adapter = jax.tree.map(lambda x: x.astype(jnp.bfloat16), trained_adapter(micro_definition))
    before = jax.tree.map(lambda x: np.asarray(x, np.float32), adapter)
    state, _ = make_train_step(definition, optimizer)(
        init_state(adapter, optimizer), base, random_batch(0, 2, 2), jax.random.key(0)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    # The first step of Adam moves every weight by the learning rate, in the gradient's direction.
    for new, old in zip(jax.tree.leaves(state.params), jax.tree.leaves(before), strict=True):
        moved = np.abs(np.asarray(new, np.float32) - old)
        assert np.all(moved <= 1e-2 + 2**-7 * (np.abs(old) + 1e-2))
        assert moved.max() > 5e-3
