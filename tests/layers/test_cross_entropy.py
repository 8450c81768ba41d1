"""The tiled loss against float64 and against torch, in value and gradient."""

from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels.cross_entropy import Implementation
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric_jax.layers.cross_entropy import LOGITS_TILE_BYTES, tile_tokens, tiled_cross_entropy

# One tile, less than one; two tiles of 16,384 tokens; tiles of 16, the last one short.
SHAPES = [(1, 8, 11), (33, 24, 259), (5, 3, 2), (20_000, 3, 300), (37, 4, 300_000)]


def problem(n: int, d: int, v: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(seed)
    hidden = random.standard_normal((n, d)).astype(np.float32)
    head = random.standard_normal((v, d)).astype(np.float32)
    targets = random.integers(0, v, n).astype(np.int32)
    weights = np.where(random.random(n) < 0.4, 0, random.random(n)).astype(np.float32)
    weights[0] = 1
    return hidden, head, targets, weights


def exact(
    hidden: np.ndarray, head: np.ndarray, targets: np.ndarray, weights: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Loss, d hidden and d head in float64."""
    hidden, head, weights = (a.astype(np.float64) for a in (hidden, head, weights))
    logits = hidden @ head.T
    top = logits.max(-1, keepdims=True)
    powers = np.exp(logits - top)
    rows = np.arange(len(targets))
    losses = np.log(powers.sum(-1)) + top[:, 0] - logits[rows, targets]
    d_logits = powers / powers.sum(-1, keepdims=True)
    d_logits[rows, targets] -= 1
    d_logits *= weights[:, None]
    return float(weights @ losses), d_logits @ head, d_logits.T @ hidden


def relative(found: jax.Array, expected: np.ndarray) -> float:
    scale = max(float(np.abs(expected).max()), 1e-30)
    return float(np.abs(np.asarray(found, np.float64) - expected).max()) / scale


@pytest.mark.parametrize("tile_bytes", [LOGITS_TILE_BYTES, 2 * LOGITS_TILE_BYTES])
@pytest.mark.parametrize("train_head", [False, True], ids=["frozen-head", "trained-head"])
@pytest.mark.parametrize(("n", "d", "v"), SHAPES)
def test_value_and_gradients_equal_float64(
    n: int, d: int, v: int, train_head: bool, tile_bytes: int
) -> None:
    """By parts of the head; and with large tiles by all of it, a frozen one filled up."""
    hidden, head, targets, weights = problem(n, d, v)
    arrays = [jnp.asarray(a) for a in (hidden, head, targets, weights)]

    @jax.jit
    def run(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
            rest, how = arrays[2:], {"train_head": train_head, "tile_bytes": tile_bytes}
            return 3.0 * tiled_cross_entropy(hidden, head, *rest, **how)

        return jax.value_and_grad(loss, (0, 1))(hidden, head)

    value, (d_hidden, d_head) = run(*arrays[:2])
    loss, exact_d_hidden, exact_d_head = exact(hidden, head, targets, weights)
    forward = tiled_cross_entropy(*arrays, tile_bytes=tile_bytes)
    assert float(forward) == pytest.approx(loss, rel=2e-6)
    assert float(value) == pytest.approx(3 * loss, rel=2e-6)
    assert relative(d_hidden, 3 * exact_d_hidden) < 1e-5
    if train_head:
        assert relative(d_head, 3 * exact_d_head) < 1e-5
    else:
        assert not np.any(np.asarray(d_head))


@pytest.mark.oracle
def test_equals_torch(oracle: Callable[..., list[ModuleType]]) -> None:
    (torch,) = oracle("torch")
    hidden, head, targets, weights = problem(40, 16, 131)
    th, tw = (torch.from_numpy(a.copy()).requires_grad_() for a in (hidden, head))
    losses = torch.nn.functional.cross_entropy(
        th @ tw.T, torch.from_numpy(targets).long(), reduction="none"
    )
    total = (losses * torch.from_numpy(weights)).sum()
    total.backward()
    rest = (jnp.asarray(targets), jnp.asarray(weights))
    value, grads = jax.value_and_grad(
        lambda h, w: tiled_cross_entropy(h, w, *rest, train_head=True), (0, 1)
    )(jnp.asarray(hidden), jnp.asarray(head))
    assert float(value) == pytest.approx(total.item(), rel=1e-6)
    assert relative(grads[0], th.grad.numpy()) < 3e-6
    assert relative(grads[1], tw.grad.numpy()) < 3e-6


def test_tokens_without_weight_count_for_nothing() -> None:
    hidden, head, targets, weights = problem(40, 4, 300_000)
    other = hidden.copy()
    other[weights == 0] = 1e3
    loss = jax.jit(jax.value_and_grad(tiled_cross_entropy))
    rest = [jnp.asarray(a) for a in (head, targets, weights)]
    first, second = loss(jnp.asarray(hidden), *rest), loss(jnp.asarray(other), *rest)
    np.testing.assert_array_equal(first[0], second[0])
    kept = weights > 0
    np.testing.assert_array_equal(np.asarray(first[1])[kept], np.asarray(second[1])[kept])
    assert not np.any(np.asarray(second[1])[~kept])


def test_large_logits_stay_finite() -> None:
    hidden, head, targets, weights = problem(9, 8, 50)
    arrays = (hidden * 1e3, head * 1e3, targets, weights)
    loss, d_hidden, _ = exact(*arrays)
    value, found = jax.value_and_grad(tiled_cross_entropy)(*map(jnp.asarray, arrays))
    assert float(value) == pytest.approx(loss, rel=1e-5)
    assert relative(found, d_hidden) < 1e-4


def test_bfloat16_hidden_states() -> None:
    hidden, head, targets, weights = problem(37, 32, 259)
    half = [jnp.asarray(a, jnp.bfloat16) for a in (hidden, head)]
    rest = (jnp.asarray(targets), jnp.asarray(weights))
    value, grads = jax.value_and_grad(
        lambda h, w: tiled_cross_entropy(h, w, *rest, train_head=True), (0, 1)
    )(*half)
    assert value.dtype == jnp.float32
    assert [g.dtype for g in grads] == [jnp.bfloat16] * 2
    loss, d_hidden, d_head = exact(*(np.asarray(a, np.float32) for a in half), targets, weights)
    assert float(value) == pytest.approx(loss, rel=1e-5)
    assert relative(grads[0], d_hidden) < 1e-2
    assert relative(grads[1], d_head) < 1e-2


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("round_logits", [False, True])
def test_a_head_that_is_filled_up(round_logits: bool, implementation: Implementation) -> None:
    """Rows that there are not have no share of a loss or gradient, whoever makes it."""
    hidden, head, targets, weights = problem(37, 32, 259)
    half = [jnp.asarray(a, jnp.bfloat16) for a in (hidden, head)]
    rest = (jnp.asarray(targets), jnp.asarray(weights))
    value, found = jax.value_and_grad(
        lambda h: tiled_cross_entropy(
            *(h, half[1], *rest),
            tile_bytes=2 * LOGITS_TILE_BYTES,
            round_logits=round_logits,
            implementation=implementation,
        )
    )(half[0])
    loss, d_hidden, _ = exact(*(np.asarray(a, np.float32) for a in half), targets, weights)
    assert float(value) == pytest.approx(loss, rel=3e-3 if round_logits else 1e-5)
    assert relative(found, d_hidden) < (3e-2 if round_logits else 1e-2)


@given(n=st.integers(1, 100_000), v=st.integers(2, 300_000))
@settings(max_examples=200, deadline=None)
def test_tiles_stay_under_32_mib(n: int, v: int) -> None:
    tile = tile_tokens(n, v)
    assert 1 <= tile <= n
    assert tile * v * 4 <= 32 << 20 or tile == min(16, n)
    assert tile == n or tile & (tile - 1) == 0


def test_compiled_scratch_holds_no_logits_of_all_tokens() -> None:
    n, d, v = 4096, 8, 32002
    hidden = jax.ShapeDtypeStruct((n, d), jnp.float32)
    head = jax.ShapeDtypeStruct((v, d), jnp.float32)
    targets = jax.ShapeDtypeStruct((n,), jnp.int32)
    weights = jax.ShapeDtypeStruct((n,), jnp.float32)
    step = jax.jit(jax.value_and_grad(tiled_cross_entropy))
    memory = step.lower(hidden, head, targets, weights).compile().memory_analysis()
    all_logits = 4 * n * v
    assert memory.temp_size_in_bytes < all_logits / 4
