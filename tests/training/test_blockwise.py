"""Block-wise 8-bit moments: the map, the blocks, and Adam with them against Adam in float32."""

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric_jax.checkpoints.train_state import TrainCheckpoints
from fabric_jax.data.batch import Batch
from fabric_jax.errors import FabricError
from fabric_jax.models.decoder import DecoderDefinition
from fabric_jax.models.initialize import Tree, initialize_adapter, initialize_base
from fabric_jax.training.blockwise import (
    BLOCK,
    BlockwiseMoment,
    dequantize_blocks,
    dynamic_map,
    quantize_blocks,
    scale_by_adam_8bit,
)
from fabric_jax.training.config import OptimizerConfig
from fabric_jax.training.loop import finetune
from fabric_jax.training.optimizer import make_optimizer
from fabric_jax.training.step import init_state, make_train_step

pytestmark = [pytest.mark.usefixtures("compiled_once"), pytest.mark.xdist_group("training")]

Float32 = npt.NDArray[np.float32]
SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


@partial(jax.jit, static_argnames="signed")
def there_and_back(x: jax.Array, signed: bool) -> tuple[BlockwiseMoment, jax.Array]:
    moment = quantize_blocks(x, signed=signed)
    return moment, dequantize_blocks(moment, x.shape, signed=signed)


def bits_of_tree(code: int, fraction_bits: int) -> Fraction:
    """What 7 or 8 bits stand for, read as the paper's Figure 2 does: leading zeros are the
    exponent, a one ends them, and the rest is a linear fraction between 0.1 and 1."""
    zeros = fraction_bits - code.bit_length()
    rest = code.bit_length() - 1
    fraction = code - (1 << rest)
    step = Fraction(9, 10) / (1 << rest)
    return (Fraction(1, 10) + step * (fraction + Fraction(1, 2))) / 10**zeros


@SIGNS
def test_the_map_is_that_of_the_bits(signed: bool) -> None:
    """Derived from bit patterns in exact arithmetic; the two patterns left over are 0 and 1."""
    if signed:
        positive = [bits_of_tree(code, 7) for code in range(1, 128)]
        expected = [*positive, *(-value for value in positive)]
    else:  # The last exponent has no pattern of its own: 2 to 255 have fractions of 1 bit or more.
        expected = [bits_of_tree(code, 8) for code in range(2, 256)]
    expected = sorted([*expected, Fraction(0), Fraction(1)])
    found = dynamic_map(signed=signed)
    assert found.dtype == np.float32
    assert len(set(found.tolist())) == 256
    np.testing.assert_allclose(found, [float(value) for value in expected], rtol=1e-7)
    assert np.all(np.diff(found) > 0)


@SIGNS
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_error_is_within_half_a_part_of_the_decade(signed: bool, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    scale = data.draw(st.floats(1e-15, 1e15))
    spread = data.draw(st.floats(0.0, 6.0))
    x = scale * rng.normal(size=(3, BLOCK)) * np.exp(spread * rng.normal(size=(3, BLOCK)))
    x = (x if signed else np.abs(x)).astype(np.float32)
    _, back = there_and_back(jnp.asarray(x), signed)
    relative = x.astype(np.float64) / np.abs(x).max(axis=1, keepdims=True)
    error = np.abs(np.asarray(back, np.float64) / np.abs(x).max(axis=1, keepdims=True) - relative)
    # Decade e from 10^(e-1) to 10^e has 2^(e+6) parts, twice as many without sign.
    with np.errstate(divide="ignore"):
        decade = np.clip(np.ceil(np.log10(np.abs(relative)) - 1e-9), -6, 0)
    bound = 0.45 * 10.0**decade / 2.0 ** (decade + (6 if signed else 7))
    # Below the smallest value, which only zero may leave downwards without sign.
    bound = np.where(np.abs(relative) < 1e-6, 6e-7, bound)
    assert np.all(error <= bound * (1 + 1e-4) + 1e-7 * np.abs(relative))


@SIGNS
def test_codes_are_the_nearest(signed: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(-1 if signed else 1e-5, 1, (4, BLOCK)).astype(np.float32)
    x[:, 0] = 1
    moment, _ = there_and_back(jnp.asarray(x), signed)
    distance = np.abs(x[..., None].astype(np.float64) - dynamic_map(signed=signed))
    chosen = np.take_along_axis(distance, np.asarray(moment.codes)[..., None].astype(int), -1)
    np.testing.assert_allclose(chosen[..., 0], distance.min(axis=-1), atol=1e-7)


@SIGNS
def test_zeros_and_the_largest_are_exact(signed: bool) -> None:
    x = np.zeros((2, 3 * BLOCK), np.float32)
    x[0, 5], x[0, 7], x[1, BLOCK] = 3.7, 1e-3, 1e-20
    _, back = there_and_back(jnp.asarray(x), signed)
    back = np.asarray(back)
    np.testing.assert_array_equal(back[x == 0], 0)
    assert back[0, 5] == np.float32(3.7)
    assert back[1, BLOCK] == np.float32(1e-20)


def test_only_zero_becomes_zero_without_sign() -> None:
    x = np.array([0, 1e-30, 1e-9, 1e-7, 1], np.float32)
    _, back = there_and_back(jnp.asarray(x), False)
    smallest = dynamic_map(signed=False)[1]
    np.testing.assert_array_equal(np.asarray(back), [0, smallest, smallest, smallest, 1])


def test_what_is_not_a_number_stays_visible() -> None:
    """So that a checkpoint of it is refused, as one of float32 moments is."""
    x = jnp.zeros((2 * BLOCK,)).at[3].set(jnp.nan)
    moment, back = there_and_back(x, True)
    assert np.isnan(moment.absmax[0])
    assert np.isnan(back[3])
    np.testing.assert_array_equal(back[BLOCK:], 0)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (256,), (3, 100), (2, 5, 60), (0, 4), (0, 2, 2)])
def test_any_shape_comes_back(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    moment, back = there_and_back(jnp.asarray(x), True)
    layers = shape[:1] if len(shape) > 2 else ()
    blocks = -(-int(np.prod(shape[len(layers) :])) // BLOCK)
    assert moment.codes.shape == (*layers, blocks, BLOCK)
    assert moment.absmax.shape == (*layers, blocks)
    assert (moment.codes.dtype, moment.absmax.dtype) == (jnp.uint8, jnp.float32)
    assert back.shape == shape
    state: Any = scale_by_adam_8bit(0.9, 0.999, 1e-8).init(jnp.asarray(x))
    assert jax.tree.map(jnp.shape, state.mu) == jax.tree.map(jnp.shape, moment)
    np.testing.assert_array_equal(dequantize_blocks(state.mu, shape, signed=True), 0)
    np.testing.assert_array_equal(dequantize_blocks(state.nu, shape, signed=False), 0)


def random_gradient(step: int, shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(np.random.default_rng(step).normal(size=shape), jnp.float32)


def adam(optimizer: optax.GradientTransformation) -> Callable[[Any, Any], tuple[Any, Any]]:
    def update(gradient: Any, state: Any) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(gradient, state)

    return jax.jit(update, donate_argnums=1)


def test_a_layer_alone_is_updated_as_in_the_whole() -> None:
    shape = (3, 20, 30)
    optimizer = scale_by_adam_8bit(0.9, 0.999, 1e-8)
    update = adam(optimizer)
    whole: Any = optimizer.init(jnp.zeros(shape))
    alone: Any = optimizer.init(jnp.zeros((1, *shape[1:])))
    for step in range(5):
        gradient = random_gradient(step, shape)
        steps, whole = update(gradient, whole)
        mine, alone = update(gradient[1:2], alone)
        np.testing.assert_array_equal(mine[0], steps[1])
    for one, all_ in zip(
        jax.tree.leaves((alone.mu, alone.nu)), jax.tree.leaves((whole.mu, whole.nu)), strict=True
    ):
        np.testing.assert_array_equal(one[0], all_[1])


def test_the_first_step_is_that_of_adam() -> None:
    """Nothing was rounded yet."""
    gradient = random_gradient(0, (40, 30))
    ours, theirs = scale_by_adam_8bit(0.9, 0.999, 1e-8), optax.scale_by_adam(0.9, 0.999, 1e-8)
    found, _ = adam(ours)(gradient, ours.init(gradient))
    expected, _ = adam(theirs)(gradient, theirs.init(gradient))
    np.testing.assert_array_equal(found, expected)


def test_no_step_is_huge_where_the_second_moment_is_small() -> None:
    """Gradients of 1e-5 beside one of 1, which then stop: the second moment of the former is far
    below the smallest value of the map, their first one is not. Rounded to zero it would leave
    first moment / epsilon: hundreds of times Adam's own step."""
    ours, theirs = scale_by_adam_8bit(0.9, 0.999, 1e-8), optax.scale_by_adam(0.9, 0.999, 1e-8)
    gradient = jnp.full((BLOCK,), 1e-5).at[0].set(1.0)
    states = [ours.init(gradient), theirs.init(gradient)]
    for step in range(40):
        present = gradient if step < 20 else jnp.zeros(BLOCK).at[0].set(1.0)
        steps = []
        for which, optimizer in enumerate((ours, theirs)):
            update, states[which] = adam(optimizer)(present, states[which])
            steps.append(np.abs(np.asarray(update)))
        assert np.all(steps[0] <= 1.5 * steps[1] + 0.05)


def run_steps(
    moments: Any, loss: Callable[[Any], jax.Array], params: Any, steps: int, rate: float
) -> Float32:
    """The loss before each step and after the last."""
    config = OptimizerConfig(
        learning_rate=rate, schedule="constant", warmup_ratio=0.0, moments=moments
    )
    optimizer = make_optimizer(config, steps)

    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    @jax.jit
    def run(params: Any) -> tuple[Any, jax.Array]:
        return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)

    (params, _), losses = run(params)
    return np.asarray([*losses, loss(params)])


def test_least_squares_falls_as_with_float32() -> None:
    rng = np.random.default_rng(0)
    a = jnp.asarray(rng.normal(size=(128, 96)) * np.geomspace(0.1, 3, 96), jnp.float32)
    b = a @ jnp.asarray(rng.normal(size=(96, 24)), jnp.float32)

    def loss(x: jax.Array) -> jax.Array:
        return jnp.mean((a @ x - b) ** 2)

    start = jnp.zeros((96, 24))
    exact, found = (run_steps(m, loss, start, 200, 2e-2) for m in ("float32", "int8"))
    assert exact[-1] < 0.02 * exact[0]
    np.testing.assert_allclose(found, exact, rtol=0.05, atol=1e-3 * exact[0])


def token_batch(seed: int) -> Batch:
    """Rows [1, 4, 16] that count to eight, something that can be learnt."""
    start = np.random.default_rng(seed).integers(0, 8, (1, 4, 1))
    tokens = jnp.asarray((start + np.arange(16)) % 8, jnp.int32)
    return Batch(
        tokens=tokens,
        targets=(tokens + 1) % 8,
        loss_mask=jnp.ones(tokens.shape, jnp.float32),
        segment_ids=jnp.ones(tokens.shape, jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), tokens.shape),
    )


@pytest.fixture(scope="module")
def base(micro_definition: DecoderDefinition) -> Tree:
    return initialize_base(micro_definition, 0)


@pytest.mark.slow
def test_a_decoder_learns_as_with_float32(micro_definition: DecoderDefinition, base: Tree) -> None:
    """At three times this rate two float32 runs that start from other adapters, and hence these
    two, are 1% apart for a while: rounded activations make the paths chaotic."""
    curves: list[Float32] = []
    for moments in ("float32", "int8"):
        config = OptimizerConfig(learning_rate=3e-3, warmup_ratio=0.0, moments=moments)
        optimizer = make_optimizer(config, 200)
        step = make_train_step(micro_definition, optimizer)
        state = init_state(initialize_adapter(micro_definition, 0), optimizer)
        losses: list[float] = []
        for number in range(200):
            state, metrics = step(state, base, token_batch(number), jax.random.key(0))
            losses.append(float(metrics.loss))
        curves.append(np.asarray(losses).reshape(10, 20).mean(axis=1))
    exact, found = curves
    assert exact[0] - exact[-1] > 0.25
    np.testing.assert_allclose(found, exact, rtol=5e-3)


def test_moments_take_two_bytes_a_parameter() -> None:
    params = {"a": jnp.zeros((4, 96, 128)), "b": jnp.zeros((64, 1000))}
    state = make_optimizer(OptimizerConfig(moments="int8"), 10).init(params)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert size <= 2.1 * sum(leaf.size for leaf in jax.tree.leaves(params))


def test_the_state_is_updated_in_place(micro_definition: DecoderDefinition, base: Tree) -> None:
    optimizer = make_optimizer(OptimizerConfig(moments="int8"), 10)
    state = init_state(initialize_adapter(micro_definition, 0), optimizer)
    step = make_train_step(micro_definition, optimizer)
    compiled = step.lower(state, base, token_batch(0), jax.random.key(0)).compile()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes == size


def test_a_checkpoint_brings_the_state_back(tmp_path: Path) -> None:
    params = {"layers": {"a": random_gradient(1, (2, 30, 20))}, "b": random_gradient(2, (300,))}
    optimizer = make_optimizer(OptimizerConfig(moments="int8"), 10)
    state = optimizer.init(params)
    _, state = optimizer.update(params, state, params)
    with TrainCheckpoints(tmp_path / "c", keep_last=1, identity={}, report=print) as checkpoints:
        checkpoints.save(1, params, state, data_state={}, meta={})
        like = jax.eval_shape(optimizer.init, params)
        restored = checkpoints.restore(params, like)
    assert restored is not None
    assert jax.tree.structure(restored.moments) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored.moments), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_run_goes_on_only_with_the_moments_it_has(
    tmp_path: Path, configure: Any, quiet: Any
) -> None:
    def config(moments: str, steps: int) -> Any:
        return configure(
            tmp_path / "run",
            optimizer={"moments": moments, "schedule": "constant", "warmup_steps": 1},
            max_steps=steps,
            resume="auto",
        )

    finetune(config("int8", 2), console=quiet)
    with pytest.raises(FabricError, match='moments is "int8" in the checkpoint, "float32" here'):
        finetune(config("float32", 4), console=quiet)
    finetune(config("int8", 4), console=quiet)
