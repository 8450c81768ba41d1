"""Straight-through estimators: the quantiser's value forward, the identity backward."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fabric_jax.errors import FabricError
from fabric_jax.quantization.absmax import absmax_fake_quantize, block256_fake_quantize
from fabric_jax.quantization.absmean import absmean_fake_quantize
from fabric_jax.quantization.straight_through import (
    fake_quantize_activation,
    quantize_activation,
    quantize_activation_block256,
    quantize_weight,
)

PAIRS = [
    pytest.param(quantize_weight, absmean_fake_quantize, id="weight"),
    pytest.param(quantize_activation, absmax_fake_quantize, id="per-token"),
    pytest.param(quantize_activation_block256, block256_fake_quantize, id="block256"),
]


def sample(seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((12, 20)).astype(np.float32)
    x[0, 0] = 50.0  # far beyond the outermost code of the weight quantiser
    x[1] = 0.0
    x[2] *= np.float32(1e-7)
    return x


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(("estimator", "quantiser"), PAIRS)
def test_value_of_the_quantiser_and_gradient_of_the_identity(
    estimator: Callable[[jax.Array], jax.Array],
    quantiser: Callable[[jax.Array], jax.Array],
    compiled: bool,
) -> None:
    x, g = jnp.asarray(sample()), jnp.asarray(sample(1))
    run = jax.jit(estimator) if compiled else estimator
    y, pull = jax.vjp(run, x)
    np.testing.assert_allclose(y, quantiser(x), rtol=2e-7)
    assert float(jnp.max(jnp.abs(y - x))) > 0
    np.testing.assert_array_equal(pull(g)[0], g)


def test_a_linear_uses_quantised_values_in_both_gradients() -> None:
    """``dx = g·W^`` and ``dW = g^T·x^``, with no mask where a weight is clipped."""
    x, w, g = sample(), sample(2)[:7], sample(3)[:, :7]

    def forward(x: jax.Array, w: jax.Array) -> jax.Array:
        return quantize_activation(x) @ quantize_weight(w).T

    _, pull = jax.vjp(forward, jnp.asarray(x), jnp.asarray(w))
    dx, dw = pull(jnp.asarray(g))
    x_hat = np.asarray(absmax_fake_quantize(jnp.asarray(x)), np.float64)
    w_hat = np.asarray(absmean_fake_quantize(jnp.asarray(w)), np.float64)
    np.testing.assert_allclose(dx, g.astype(np.float64) @ w_hat, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, g.T.astype(np.float64) @ x_hat, rtol=1e-5, atol=1e-4)
    assert dw[0, 0] != 0


@pytest.mark.oracle
def test_gradients_of_a_linear_equal_transformers(oracle: Callable[..., list[ModuleType]]) -> None:
    torch, bitnet = oracle("torch", "transformers.integrations.bitnet")
    x, w, g = sample(), sample(2)[:7], sample(3)[:, :7]
    tx, tw = (torch.from_numpy(a).requires_grad_() for a in (x, w.copy()))
    out = torch.nn.functional.linear(bitnet.ActQuant.apply(tx), bitnet.WeightQuant.apply(tw))
    out.backward(torch.from_numpy(g.copy()))

    def forward(x: jax.Array, w: jax.Array) -> jax.Array:
        return quantize_activation(x) @ quantize_weight(w).T

    y, pull = jax.vjp(forward, jnp.asarray(x), jnp.asarray(w))
    dx, dw = pull(jnp.asarray(g))
    for found, expected in ((y, out.detach()), (dx, tx.grad), (dw, tw.grad)):
        exact = expected.numpy()
        np.testing.assert_allclose(found, exact, rtol=0, atol=2e-6 * np.abs(exact).max())


def test_names_of_activation_quantisers() -> None:
    x = jnp.asarray(sample())
    np.testing.assert_array_equal(fake_quantize_activation(x, "none"), x)
    np.testing.assert_array_equal(fake_quantize_activation(x, "per_token"), absmax_fake_quantize(x))
    np.testing.assert_array_equal(
        fake_quantize_activation(x, "block256"), block256_fake_quantize(x)
    )
    with pytest.raises(FabricError, match=r"unknown activation quantiser 'per_tokn'.*per_token"):
        fake_quantize_activation(x, cast(Any, "per_tokn"))
