"""Masters packed in every forward pass: the packed linear's bits, the master's gradients."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import Prologue, pack
from fabric_kernels.ternary_matmul import ternary_linear_of_codes
from fabric_kernels.ternary_matmul.weight import TernaryWeight

from fabric_jax.errors import FabricError
from fabric_jax.quantization.absmax import absmax_fake_quantize, absmax_quantize
from fabric_jax.quantization.absmean import absmean_fake_quantize, absmean_quantize
from fabric_jax.quantization.master_group import packed_masters
from fabric_jax.quantization.master_linear import master_linear
from fabric_jax.quantization.packed_linear import packed_linear
from fabric_jax.quantization.ste_options import SteOptions

K, WIDTHS = 200, (24, 40)


def operands(dtype: str = "float32") -> tuple[jax.Array, list[jax.Array], tuple[jax.Array, ...]]:
    """Inputs [3, 5, K], masters [N, K] and gradients [3, 5, N]."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((3, 5, K)), dtype)
    weights = [jnp.asarray(0.02 * random.standard_normal((n, K)), jnp.float32) for n in WIDTHS]
    gradients = tuple(jnp.asarray(random.standard_normal((3, 5, n)), dtype) for n in WIDTHS)
    return x, weights, gradients


@pytest.mark.parametrize("implementation", ["xla", "cpu", "triton"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_outputs_are_those_of_packed_linears_bit_for_bit(dtype: str, implementation: Any) -> None:
    x, weights, _ = operands(dtype)
    found = packed_masters(x, weights, implementation=implementation)
    for y, w in zip(found, weights, strict=True):
        codes, scale = absmean_quantize(w)
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(y, packed_linear(x, pack(codes, "ternary2"), scale))
        np.testing.assert_array_equal(y, master_linear(x, w))


@pytest.mark.parametrize(("implementation", "bits"), [("xla", 16), ("cpu", 24)])
def test_gradients_take_quantised_values_and_no_mask(implementation: Any, bits: Any) -> None:
    x, weights, gradients = operands()
    _, pull = jax.vjp(
        lambda x, weights: packed_masters(
            x, weights, implementation=implementation, gradient_bits=bits
        ),
        x,
        weights,
    )
    dx, dw = pull(gradients)
    x_hat = np.asarray(absmax_fake_quantize(x), np.float64)
    g = [np.asarray(one, np.float64) for one in gradients]
    hats = [np.asarray(absmean_fake_quantize(w), np.float64) for w in weights]
    expected = sum(one @ hat for one, hat in zip(g, hats, strict=True))
    np.testing.assert_allclose(dx, expected, atol=1e-6 * np.abs(expected).max())
    for found, one in zip(dw, g, strict=True):
        exact = np.einsum("abn,abk->nk", one, x_hat)
        np.testing.assert_allclose(found, exact, atol=1e-6 * np.abs(exact).max())


def test_clipped_gradients_stop_beyond_the_scale() -> None:
    x, weights, gradients = operands()

    def by_weights(ste: SteOptions) -> list[jax.Array]:
        return jax.vjp(lambda w: packed_masters(x, w, ste=ste), weights)[1](gradients)[0]

    free, clipped = by_weights(SteOptions()), by_weights(SteOptions(weight_gradient="clipped"))
    for w, one, other in zip(weights, free, clipped, strict=True):
        inside = np.abs(w) <= np.abs(w).mean()
        np.testing.assert_array_equal(other, np.where(inside, one, 0))


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("gated", [False, True])
def test_a_prologue_is_what_the_steps_compute(gated: bool, implementation: Any) -> None:
    x, weights, gradients = operands()
    gate, gain = jnp.roll(x, 1, 0), jnp.linspace(1.0, 1.1, K)

    def prologue(gate: jax.Array, gain: jax.Array) -> Prologue:
        own = gate if gated else None
        return Prologue(gate=own, gain=gain, activation="silu" if gated else None, eps=1e-5)

    def run(x: jax.Array, gate: jax.Array, gain: jax.Array, weights: Any, which: Any) -> Any:
        return packed_masters(x, weights, prologue=prologue(gate, gain), implementation=which)

    outputs, pulled = [], []
    for which in (implementation, "xla"):
        y, pull = jax.vjp(partial(run, which=which), x, gate, gain, weights)
        outputs.append(y)
        pulled.append(jax.tree.leaves(pull(gradients)))
    for one, other in zip(outputs[0], outputs[1], strict=True):
        # A code may be its neighbour where a sum's order moved a value.
        np.testing.assert_allclose(one, other, atol=2e-2 * np.abs(other).max())
    for one, other in zip(*pulled, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3 * max(np.abs(other).max(), 1e-6))


def test_products_of_codes_refuse_what_does_not_fit() -> None:
    x, (w, _), _ = operands()
    codes, scale = absmax_quantize(x)
    weight = TernaryWeight(pack(absmean_quantize(w)[0], "ternary2"), jnp.float32(1), None, K)
    with pytest.raises(TypeError, match="takes int8 codes, found float32"):
        ternary_linear_of_codes(x, scale, [weight], "float32")
    with pytest.raises(ValueError, match=f"weights of K = 100, found {K}"):
        ternary_linear_of_codes(codes[..., :100], scale, [weight], "float32")


def test_several_scales_a_matrix_can_not_be_packed() -> None:
    with pytest.raises(FabricError, match="packed weights have one scale a matrix"):
        SteOptions(product="packed", weight_scale="channel")
