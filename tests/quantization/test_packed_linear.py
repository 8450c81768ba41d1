"""The packed linear: exact integers forward, the dequantised matrix backward."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import pack_ternary2
from fabric_kernels.ternary_matmul import GradientBits

from fabric_jax.errors import FabricError
from fabric_jax.quantization.absmax import ActQuant, absmax_quantize, block256_fake_quantize
from fabric_jax.quantization.packed_linear import packed_linear

N, K = 13, 300


def problem() -> tuple[np.ndarray, np.ndarray, jax.Array, jax.Array]:
    random = np.random.default_rng(0)
    codes = random.integers(-1, 2, (N, K)).astype(np.int8)
    x = random.standard_normal((2, 5, K)).astype(np.float32)
    x[0, 0] = 0
    return x, codes, pack_ternary2(jnp.asarray(codes)), jnp.float32(0.73)


def exact_product(x: jax.Array, codes: np.ndarray, scale: float, act_quant: str) -> np.ndarray:
    if act_quant == "per_token":
        q, s = absmax_quantize(x)
        integers = np.asarray(q, np.int64) @ codes.T.astype(np.int64)
        return integers / np.asarray(s, np.float64) * scale
    values = x if act_quant == "none" else block256_fake_quantize(x)
    return np.asarray(values, np.float64) @ codes.T * scale


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("act_quant", ["per_token", "block256", "none"])
@pytest.mark.parametrize("gradient_bits", [16, 24])
def test_forward_and_backward(
    gradient_bits: GradientBits, act_quant: ActQuant, compiled: bool
) -> None:
    x, codes, packed, scale = problem()

    def forward(x: jax.Array) -> jax.Array:
        return packed_linear(x, packed, scale, act_quant=act_quant, gradient_bits=gradient_bits)

    y, pull = jax.vjp(jax.jit(forward) if compiled else forward, jnp.asarray(x))
    exact = exact_product(jnp.asarray(x), codes, 0.73, act_quant)
    # Per token the sum is exact; only the scales round.
    bound = 4e-7 if act_quant == "per_token" else 4e-6
    np.testing.assert_allclose(y, exact, rtol=0, atol=bound * np.abs(exact).max())
    g = np.random.default_rng(1).standard_normal(exact.shape).astype(np.float32)
    dx = g.astype(np.float64) @ codes * 0.73
    # Half a step of 1/32512 of the row's largest gradient for each of the N terms.
    coarse = gradient_bits == 16 and act_quant == "per_token"
    steps = np.abs(g).max() * 0.73 * N / 2 / 32512 if coarse else 0
    bound = 3e-6 * np.abs(dx).max() + steps
    np.testing.assert_allclose(pull(jnp.asarray(g))[0], dx, rtol=0, atol=bound)


@pytest.mark.parametrize("act_quant", ["per_token", "block256", "none"])
def test_the_matrix_and_its_scale_get_no_gradient(act_quant: ActQuant) -> None:
    x, _, packed, scale = problem()
    loss = lambda s: jnp.sum(packed_linear(jnp.asarray(x), packed, s, act_quant=act_quant))  # noqa: E731
    assert float(jax.grad(loss)(scale)) == 0


@pytest.mark.parametrize("act_quant", ["per_token", "block256", "none"])
def test_bfloat16_in_and_out(act_quant: ActQuant) -> None:
    x, codes, packed, scale = problem()
    half = jnp.asarray(x, jnp.bfloat16)
    y, pull = jax.vjp(lambda x: packed_linear(x, packed, scale, act_quant=act_quant), half)
    assert y.dtype == jnp.bfloat16
    assert pull(y)[0].dtype == jnp.bfloat16
    exact = exact_product(half, codes, 0.73, act_quant)
    # Per token a bfloat16 input still gives an exact product, rounded once.
    relative = 2**-8 if act_quant == "per_token" else 2**-6
    np.testing.assert_allclose(
        np.asarray(y, np.float64), exact, rtol=relative, atol=relative * np.abs(exact).max() / 50
    )


@pytest.mark.oracle
@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_equals_the_offline_linears_of_transformers(
    linear_class: str, oracle: Callable[..., list[ModuleType]]
) -> None:
    """``bitlinear`` stores the reciprocal of the scale, ``autobitlinear`` the scale."""
    torch, bitnet = oracle("torch", "transformers.integrations.bitnet")
    random = np.random.default_rng(2)
    codes = random.integers(-1, 2, (16, K)).astype(np.int8)
    x = random.standard_normal((5, K)).astype(np.float32)
    if linear_class == "bitlinear":
        module = bitnet.BitLinear(K, 16, False, dtype=torch.float32)
        module.weight = bitnet.pack_weights(torch.from_numpy(codes.copy()))
        module.weight_scale = torch.tensor([1 / 0.73])
    else:
        module = bitnet.AutoBitLinear(K, 16, False, dtype=torch.float32, online_quant=False)
        module.weight.data = torch.from_numpy(codes.astype(np.float32))
        module.weight_scale = torch.tensor([0.73])
    tx = torch.from_numpy(x).requires_grad_()
    expected = module(tx)
    y = packed_linear(jnp.asarray(x), pack_ternary2(jnp.asarray(codes)), jnp.float32(0.73))
    largest = float(expected.detach().abs().max())
    np.testing.assert_allclose(y, expected.detach().numpy(), rtol=0, atol=3e-6 * largest)


def test_an_unknown_quantiser_raises() -> None:
    x, _, packed, scale = problem()
    with pytest.raises(FabricError, match="unknown activation quantiser 'int4'"):
        packed_linear(jnp.asarray(x), packed, scale, act_quant=cast(Any, "int4"))
