"""RMSNorm against float64 and against Llama's."""

from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fabric_jax.layers.norm import RMSNorm
from tests.layers.binding import bind


def norm_of(gain: np.ndarray, eps: float) -> RMSNorm:
    return bind(RMSNorm(gain.size, eps=eps, dtype="float32"), {"gain": jnp.asarray(gain)})


def sample() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    x = (random.standard_normal((3, 4, 48)) * 10.0 ** random.uniform(-4, 4, (3, 4, 1))).astype("f4")
    x[0, 0] = 0
    return x, random.standard_normal(48).astype(np.float32)


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_equals_float64(eps: float) -> None:
    x, gain = sample()
    wide = x.astype(np.float64)
    exact = wide / np.sqrt(np.mean(wide**2, -1, keepdims=True) + eps) * gain
    np.testing.assert_allclose(norm_of(gain, eps)(jnp.asarray(x)), exact, rtol=1e-6, atol=1e-9)


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_llama_in_value_and_gradient(
    dtype: str, oracle: Callable[..., list[ModuleType]]
) -> None:
    torch, llama = oracle("torch", "transformers.models.llama.modeling_llama")
    x, gain = sample()
    module = llama.LlamaRMSNorm(48, eps=1e-5).to(getattr(torch, dtype))
    module.weight.data = torch.from_numpy(gain).to(getattr(torch, dtype))
    tx = torch.from_numpy(x).to(getattr(torch, dtype)).requires_grad_()
    expected = module(tx)
    expected.sum().backward()
    ours = norm_of(gain, 1e-5)
    y, pull = jax.vjp(ours, jnp.asarray(x, dtype))
    relative = 1e-6 if dtype == "float32" else 2**-8
    np.testing.assert_allclose(
        np.asarray(y, np.float32), expected.detach().float().numpy(), rtol=relative, atol=1e-7
    )
    dx = tx.grad.float().numpy()
    found = np.asarray(pull(jnp.ones_like(y))[0], np.float32)
    bound = np.maximum(np.abs(dx).max(-1, keepdims=True), 1e-3) * (2e-5 if relative < 1e-3 else 0.1)
    assert np.all(np.abs(found - dx) <= bound)


def test_the_gain_is_applied_in_the_dtype_of_the_input() -> None:
    """Llama rounds to bfloat16 before the gain: 1 + 2^-9 times 1 + 2^-7 shows the order."""
    x, gain = sample()
    half = jnp.asarray(x, jnp.bfloat16)
    wide = np.asarray(half, np.float32)
    normal = wide / np.sqrt(np.mean(wide**2, -1, keepdims=True) + np.float32(1e-5))
    rounded = jnp.asarray(normal, jnp.bfloat16)
    expected = rounded * jnp.asarray(gain, jnp.bfloat16)[None, None]
    found = norm_of(gain, 1e-5)(half)
    assert found.dtype == jnp.bfloat16
    equal = np.mean(np.asarray(found, np.float32) == np.asarray(expected, np.float32))
    assert equal > 0.995
