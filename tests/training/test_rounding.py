"""Stochastic rounding to bfloat16: one of two neighbours, right on average, used by both steps."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.initialize import initialize_adapter, initialize_base
from fabric_jax.training.config import OptimizerConfig
from fabric_jax.training.optimizer import make_optimizer
from fabric_jax.training.rounding import apply_updates, stochastic_round
from fabric_jax.training.step import TrainState, init_state, make_train_step
from tests.training.conftest import MICRO
from tests.training.test_train_step import random_batch

BF16 = jnp.bfloat16
LARGEST = float(jnp.finfo(BF16).max)


def rounded(x: np.ndarray, seed: int = 0) -> np.ndarray:
    found = stochastic_round(jnp.asarray(x, jnp.float32), BF16, jax.random.key(seed))
    assert found.dtype == BF16
    return np.asarray(found)


def neighbours(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bfloat16 towards zero and the one away from it, as float32, by the bits of ``x``."""
    bits = x.astype(np.float32).view(np.uint32)
    low = bits & np.uint32(0xFFFF0000)
    high = np.where(low == bits, low, low + np.uint32(0x10000))
    return low.view(np.float32), high.view(np.float32)


@pytest.mark.parametrize("value", [1.0009765625, -3.1415927, 1e-30, -2.5e-40, 123456.789, 0.1])
def test_the_mean_over_many_keys_is_the_value(value: float) -> None:
    count = 1 << 16
    x = np.full(1, value, np.float32)
    keys = jax.random.split(jax.random.key(1), count)
    each = jax.vmap(lambda key: stochastic_round(jnp.asarray(x), BF16, key))(keys)
    low, high = (side.astype(np.float64)[0] for side in neighbours(x))
    up = (np.asarray(each).astype(np.float64)[:, 0] - low) / (high - low)
    p = (float(x[0]) - low) / (high - low)
    assert abs(up.mean() - p) < 4 * np.sqrt(p * (1 - p) / count)


def test_what_bfloat16_holds_stays_as_it_is() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    found = rounded(every.astype(np.float32))
    nan = np.isnan(every.astype(np.float32))
    assert np.array_equal(found[~nan].view(np.uint16), every[~nan].view(np.uint16))
    assert np.isnan(found[nan].astype(np.float32)).all()


def test_nan_with_a_payload_in_the_lower_half_stays_nan() -> None:
    odd = np.array([0x7F800001, 0xFF80FFFF, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    for seed in range(20):
        assert np.isnan(rounded(odd, seed).astype(np.float32)).all()


@settings(deadline=None)
@given(
    st.lists(
        st.floats(width=32, allow_nan=False, min_value=-LARGEST, max_value=LARGEST),
        min_size=8,
        max_size=8,
    ),
    st.integers(0, 2**31 - 1),
)
def test_the_result_is_one_of_two_neighbours(values: list[float], seed: int) -> None:
    x = np.array(values, np.float32)
    found = rounded(x, seed).astype(np.float32)
    low, high = neighbours(x)
    assert np.all((found == low) | (found == high))
    assert np.all((np.abs(low) <= np.abs(x)) & (np.abs(x) <= np.abs(high)))


def test_a_key_gives_the_same_result_again_and_another_key_another() -> None:
    x = np.random.default_rng(0).normal(size=1000)
    assert np.array_equal(rounded(x, 1), rounded(x, 1))
    assert not np.array_equal(rounded(x, 1), rounded(x, 2))


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match="float32 to bfloat16"):
        stochastic_round(jnp.ones(2), jnp.float16, jax.random.key(0))
    with pytest.raises(TypeError, match="float32 to bfloat16"):
        stochastic_round(jnp.ones(2, BF16), BF16, jax.random.key(0))


def test_updates_too_small_for_the_nearest_add_up() -> None:
    steps, update = 256, 2.0**-12
    start = jnp.ones((1, 4096), BF16)
    nearest, params = start, {"w": start}
    change = {"w": jnp.full(start.shape, update, jnp.float32)}

    def turn(i: jax.Array, params: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return apply_updates(params, change, jax.random.fold_in(jax.random.key(0), i))

    for _ in range(3):
        nearest = (nearest.astype(jnp.float32) + update).astype(BF16)
    assert np.array_equal(np.asarray(nearest), np.asarray(start))
    found = np.asarray(jax.lax.fori_loop(0, steps, turn, params)["w"]).astype(np.float64)
    # Every step adds 2^-7 with probability 2^-5.
    p, ulp = update / 2.0**-7, 2.0**-7
    sigma = ulp * np.sqrt(steps * p * (1 - p) / found.size)
    assert abs(found.mean() - (1 + steps * update)) < 4 * sigma


def test_float32_leaves_are_added_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    p, u = (rng.normal(size=(3, 50)).astype(np.float32) for _ in range(2))
    for tree in ({"layers": {"w": p}}, {"w": p}):
        update = jax.tree.map(lambda _: jnp.asarray(u), tree)
        found = apply_updates(jax.tree.map(jnp.asarray, tree), update, jax.random.key(0))
        np.testing.assert_array_equal(jax.tree.leaves(found)[0], p + u)


def test_a_stack_becomes_what_its_layers_become_one_by_one() -> None:
    rng = np.random.default_rng(0)
    params = {"layers": {n: jnp.asarray(rng.normal(size=(3, 4, 50)), BF16) for n in "ab"}}
    updates = jax.tree.map(lambda p: jnp.asarray(1e-3 * rng.normal(size=p.shape), "f4"), params)
    key = jax.random.key(5)
    whole = apply_updates(params, updates, key)
    for layer in range(3):
        own, change = (jax.tree.map(lambda x, i=layer: x[i], t) for t in (params, updates))
        one = apply_updates(own, change, key, layer=jnp.int32(layer))
        for n in "ab":
            np.testing.assert_array_equal(one["layers"][n], whole["layers"][n][layer])
    # Leaves and layers have random numbers of their own.
    same = jax.tree.map(lambda p: jnp.full(p.shape, 1.003, BF16), params)
    tiny = jax.tree.map(lambda p: jnp.full(p.shape, 3e-3, jnp.float32), params)
    found = apply_updates(same, tiny, key)["layers"]
    assert not np.array_equal(found["a"], found["b"])
    assert not np.array_equal(found["a"][0], found["a"][1])


def run(dtype: str, *, fused: bool, freeze_a: bool = False) -> TrainState:
    lora = LoraConfig(rank=4, dropout=0.1, adapter_dtype=dtype, freeze_a=freeze_a)  # pyright: ignore[reportArgumentType]
    definition = define_decoder(MICRO, DecoderOptions(remat="layer", lora=lora))
    config = OptimizerConfig(learning_rate=1e-3, warmup_ratio=0.0, clip_norm=0.0)
    optimizer = make_optimizer(config, 8, freeze_a=freeze_a)
    state = init_state(initialize_adapter(definition, 0), optimizer)
    base, step = initialize_base(definition, 0), make_train_step(definition, optimizer, fused=fused)
    for seed in range(2):
        state, _ = step(state, base, random_batch(seed, 1, 2), jax.random.key(3))
    return state


@pytest.mark.parametrize("freeze_a", [False, True])
@pytest.mark.slow
def test_the_fused_step_rounds_as_the_plain_one_does(freeze_a: bool) -> None:
    plain, fused = (run("bfloat16", fused=fused, freeze_a=freeze_a) for fused in (False, True))
    pairs = zip(jax.tree.leaves(plain.params), jax.tree.leaves(fused.params), strict=True)
    equal = [np.asarray(one) == np.asarray(other) for one, other in pairs]
    assert all(one.dtype == BF16 for one in jax.tree.leaves(fused.params))
    # Adam's first steps are learning rates with a sign, so hardly any sum rounds elsewhere.
    assert np.concatenate([one.ravel() for one in equal]).mean() > 0.99
