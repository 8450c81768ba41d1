"""RMSNorm against float64, Llama's and Gemma's."""

from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fabric_jax.layers.norm import RMSNorm
from tests.layers.binding import bind


def norm_of(gain: np.ndarray, eps: float, offset: float = 0.0) -> RMSNorm:
    norm = RMSNorm(gain.size, eps=eps, dtype="float32", offset=offset)
    return bind(norm, {"gain": jnp.asarray(gain)})


def sample() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    x = (random.standard_normal((3, 4, 48)) * 10.0 ** random.uniform(-4, 4, (3, 4, 1))).astype("f4")
    x[0, 0] = 0
    return x, random.standard_normal(48).astype(np.float32)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_equals_float64(eps: float, offset: float) -> None:
    x, gain = sample()
    wide = x.astype(np.float64)
    exact = wide / np.sqrt(np.mean(wide**2, -1, keepdims=True) + eps) * (offset + gain)
    found = norm_of(gain, eps, offset)(jnp.asarray(x))
    np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-9)


@pytest.mark.oracle
@pytest.mark.parametrize("offset", [0.0, 1.0], ids=["llama", "gemma"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_transformers_in_value_and_gradient(
    dtype: str, offset: float, oracle: Callable[..., list[ModuleType]]
) -> None:
    torch, llama, gemma3 = oracle(
        "torch",
        "transformers.models.llama.modeling_llama",
        "transformers.models.gemma3.modeling_gemma3",
    )
    x, gain = sample()
    make = gemma3.Gemma3RMSNorm if offset else llama.LlamaRMSNorm
    module = make(48, eps=1e-5).to(getattr(torch, dtype))
    module.weight.data = torch.from_numpy(gain).to(getattr(torch, dtype))
    tx = torch.from_numpy(x).to(getattr(torch, dtype)).requires_grad_()
    expected = module(tx)
    expected.sum().backward()
    ours = norm_of(np.asarray(jnp.asarray(gain, dtype), np.float32), 1e-5, offset)
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


def test_with_an_offset_the_gain_is_applied_in_float32() -> None:
    """Gemma rounds once, after the gain."""
    x, gain = sample()
    half = jnp.asarray(x, jnp.bfloat16)
    wide = np.asarray(half, np.float32)
    normal = wide / np.sqrt(np.mean(wide**2, -1, keepdims=True) + np.float32(1e-5))
    expected = np.asarray(jnp.asarray(normal * (1 + gain), jnp.bfloat16), np.float32)
    found = norm_of(gain, 1e-5, 1.0)(half)
    assert found.dtype == jnp.bfloat16
    assert np.mean(np.asarray(found, np.float32) == expected) > 0.995
