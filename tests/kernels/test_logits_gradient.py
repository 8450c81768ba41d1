"""Losses of rows of logits and their gradients against float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels.cross_entropy import logits_gradient

ROWS = 13


def exact(
    z: np.ndarray, targets: np.ndarray, weights: np.ndarray, z_loss: float
) -> tuple[np.ndarray, np.ndarray]:
    """In float64."""
    z, weights, rows = z.astype(np.float64), weights.astype(np.float64), np.arange(len(z))
    top = z.max(-1)
    powers = np.exp(z - top[:, None])
    lse = top + np.log(powers.sum(-1))
    gradient = powers / powers.sum(-1, keepdims=True) * (1 + 2 * z_loss * lse)[:, None]
    gradient[rows, targets] -= 1
    losses = lse - z[rows, targets] + z_loss * lse**2
    return weights * losses, gradient * weights[:, None]


# Blocks that are whole, one that is part of a row, and a last one that is short.
@pytest.mark.parametrize("vocab", [300, 9000, 16384])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_equals_float64(implementation: Any, z_loss: float, dtype: str, vocab: int) -> None:
    random = np.random.default_rng(vocab)
    z = jnp.asarray(4 * random.standard_normal((ROWS, vocab)) - 20, dtype)
    targets = random.integers(0, vocab, ROWS).astype(np.int32)
    targets[0], targets[1] = 0, vocab - 1
    weights = random.random(ROWS).astype(np.float32)
    weights[3] = 0
    losses, gradient = exact(np.asarray(z, np.float64), targets, weights, z_loss)
    found = jax.jit(
        lambda z, t, w: logits_gradient(
            z, t, w, dtype, z_loss=z_loss, implementation=implementation
        )
    )(z, targets, weights)
    assert found[1].dtype == dtype
    np.testing.assert_allclose(found[0], losses, rtol=2e-6, atol=1e-6)
    step = 2**-8 if dtype == "bfloat16" else 2e-6
    np.testing.assert_allclose(np.asarray(found[1], np.float64), gradient, rtol=step, atol=1e-7)
    assert not np.asarray(found[1][3], np.float64).any()


def test_refuses_an_unknown_name() -> None:
    arrays: Any = (jnp.zeros((2, 5)), jnp.zeros(2, jnp.int32), jnp.ones(2))
    with pytest.raises(ValueError, match="xla, triton; found 'cuda'"):
        logits_gradient(*arrays, "float32", implementation="cuda")  # pyright: ignore


@pytest.mark.parametrize(("vocab", "count"), [(300, 280), (8192, 8100), (16384, 8192)])
@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_what_lies_behind_the_logits_counts_for_nothing(
    implementation: Any, vocab: int, count: int
) -> None:
    random = np.random.default_rng(count)
    z = np.full((ROWS, vocab), np.nan, np.float32)
    z[:, :count] = 4 * random.standard_normal((ROWS, count))
    targets = random.integers(0, count, ROWS).astype(np.int32)
    weights = random.random(ROWS).astype(np.float32)
    losses, gradient = exact(z[:, :count], targets, weights, 0.0)
    found = logits_gradient(
        *map(jnp.asarray, (z, targets, weights)),
        "float32",
        count=count,
        implementation=implementation,
    )
    np.testing.assert_allclose(found[0], losses, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(found[1][:, :count], gradient, rtol=2e-6, atol=1e-7)
    np.testing.assert_array_equal(found[1][:, count:], 0)
