"""Twins of exact and rounded values: what flows forward, what flows back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fabric_jax.layers.residuals import INT8_RESIDUAL, as_codes, from_codes, joined, on_both


def codes_of(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Values that int8 codes hold exactly: each row is integers, 127 the largest, times 2^-5."""
    codes = random.integers(-126, 127, shape)
    codes[..., 0] = 127
    return (codes / 32).astype(np.float32)


def gated(gate: Any, up: Any, xp: Any) -> Any:
    product = gate / (1 + xp.exp(-gate)) * up
    return product / xp.sqrt((product * product).mean(-1, keepdims=True) + 1e-5)


def test_the_gradient_equals_float64_where_codes_hold_the_inputs() -> None:
    random = np.random.default_rng(0)
    gate, up = codes_of(random, (3, 5, 16)), codes_of(random, (3, 5, 16))
    weight = random.standard_normal((3, 5, 16))
    direction = [random.standard_normal((3, 5, 16)) for _ in range(2)]

    def loss(gate: jax.Array, up: jax.Array) -> jax.Array:
        wrapped = from_codes(lambda g, u: gated(g, u, jnp))
        return jnp.sum(wrapped(gate, up) * jnp.asarray(weight, jnp.float32))

    gradients = jax.grad(loss, argnums=(0, 1))(jnp.asarray(gate), jnp.asarray(up))
    step = 1e-6
    for which in range(2):
        ends = []
        for sign in (1, -1):
            at = [gate.astype(np.float64), up.astype(np.float64)]
            at[which] = at[which] + sign * step * direction[which]
            ends.append(np.sum(gated(*at, np) * weight))
        slope = np.sum(np.asarray(gradients[which], np.float64) * direction[which])
        assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_are_exact_and_gradients_those_at_the_codes(dtype: str) -> None:
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 32)), dtype)
    cube = from_codes(lambda x: x * x * x)
    np.testing.assert_array_equal(cube(x), x * x * x)
    value, back = jax.vjp(cube, x)
    np.testing.assert_array_equal(value, x * x * x)
    (found,) = back(jnp.ones_like(value))
    at_codes = as_codes(x).kept
    expected = 3 * np.asarray(at_codes, np.float32) ** 2
    np.testing.assert_allclose(
        np.asarray(found, np.float32), expected, rtol=1e-6 if dtype == "float32" else 2e-2
    )
    largest = np.abs(np.asarray(x, np.float32)).max(-1, keepdims=True)
    error = np.abs(np.asarray(at_codes, np.float32) - np.asarray(x, np.float32))
    assert np.all(error <= largest * (0.5 / 127 + (0 if dtype == "float32" else 2**-8)) * 1.0001)


def test_only_codes_and_scales_are_kept() -> None:
    """What ``checkpoint`` saves of a wrapped function is a byte a value and a float a row."""
    keep = jax.checkpoint_policies.save_only_these_names(INT8_RESIDUAL)

    def between(w: jax.Array, x: jax.Array) -> jax.Array:
        hidden = as_codes(x @ w)
        return joined(on_both(jnp.tanh, on_both(jnp.add, x, hidden))).sum()

    function = jax.checkpoint(between, policy=keep)
    w, x = jnp.ones((8, 8)), jnp.ones((5, 8))
    _, back = jax.vjp(function, w, x)
    kept = sorted((str(leaf.dtype), leaf.shape) for leaf in jax.tree.leaves(back))
    arguments = [("float32", (5, 8)), ("float32", (8, 8))]
    assert kept == [("float32", (5, 1)), *arguments, ("int8", (5, 8))]


def test_without_twins_nothing_is_wrapped() -> None:
    x = jnp.arange(3.0)
    np.testing.assert_array_equal(joined(on_both(jnp.add, x, x)), x + x)
    assert isinstance(on_both(jnp.add, x, x), jax.Array)
