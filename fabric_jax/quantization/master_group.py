"""Linear maps of master weights that share an input, as products with packed weights.

Weights are quantised and packed in every forward pass, two bits each, and multiplied by the kernels
of frozen ones, which scale and round sums before they store them; the input is quantised once for
all. Forward bit for bit what ``master_linear`` computes. Backward ``dx = sum_i g_i · W_i^`` is one
product over all matrices, summed in float32 and rounded once, and ``dW_i = g_i^T · x^``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from fabric_kernels import Prologue, TernaryWeight, pack_ternary2
from fabric_kernels.norm import MOST_CHANNELS, normalised_codes
from fabric_kernels.ternary_matmul import (
    GradientBits,
    Implementation,
    apply_prologue,
    resolve,
    select_implementation,
    side_implementation,
    ternary_linear_of_codes,
    ternary_linear_transposed,
)
from jax import lax
from jaxtyping import Array, Float, Float32

from fabric_jax.quantization.master_linear import (
    activation_codes,
    general_dot,
    turned_input,
    weight_codes,
)
from fabric_jax.quantization.ste_options import SteOptions


@dataclass(frozen=True, kw_only=True)
class Products:
    """What multiplies.

    Attributes:
        implementation: of products with packed weights; None picks.
        gradient_bits: of the backward product by the input, on CPU.
        clipped: whether a weight beyond its scale gets no gradient.
    """

    implementation: Implementation | None = None
    gradient_bits: GradientBits = 16
    clipped: bool = False


def packed_masters(
    x: Float[Array, "*batch k"],
    weights: Sequence[Float32[Array, "n k"]],
    *,
    prologue: Prologue | None = None,
    name: str = "",
    ste: SteOptions | None = None,
    keys: Sequence[jax.Array | None] | None = None,
    implementation: Implementation | None = None,
    gradient_bits: GradientBits = 16,
) -> tuple[Float[Array, "*batch n"], ...]:
    """``q(x) · q(W_i)^T`` in the dtype of ``x`` for matrices that share an input.

    Args:
        x: inputs.
        weights: master weights.
        prologue: what happens to ``x`` first; on GPUs norm and quantiser are then one kernel.
        name: of one of the linears; all of them quantise their input alike.
        ste: variant; None for BitNet b1.58's own rule.
        keys: of each matrix for stochastic rounding; None rounds to nearest.
        implementation: which ``ternary_matmul`` runs; ``None`` picks.
        gradient_bits: width of gradients in the product by the input, on CPU.
    """
    ste = ste or SteOptions()
    packed: list[TernaryWeight] = []
    for weight, key in zip(weights, keys or [None] * len(weights), strict=True):
        digits, scale = weight_codes(lax.stop_gradient(weight), ste, key)
        bytes_ = pack_ternary2(digits.astype(jnp.int8))
        packed.append(TernaryWeight(bytes_, scale, None, weight.shape[1]))
    codes, act_scale, rows = _quantised(x, prologue, packed[0], name, ste, implementation)
    how = Products(
        implementation=implementation,
        gradient_bits=gradient_bits,
        clipped=ste.weight_gradient == "clipped",
    )
    operands = (codes, act_scale, tuple(packed))
    outputs = cast(tuple[jax.Array, ...], _products(how, rows, tuple(weights), operands))
    return tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in outputs)


def _quantised(
    x: jax.Array,
    prologue: Prologue | None,
    weight: TernaryWeight,
    name: str,
    ste: SteOptions,
    implementation: Implementation | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes int8 [M, K], their scale [M, 1], and [M, K] that the gradient by the input goes to."""
    before, gate = prologue or Prologue(), None
    rows = x.reshape(-1, x.shape[-1])
    if before.gate is not None:
        gate = before.gate.reshape(rows.shape)
    run = resolve(select_implementation(implementation), "linear", len(rows), weight)
    own = ste.activations == "int8" and not ste.hadamard and rows.shape[-1] <= MOST_CHANNELS
    if run in ("mosaic_gpu", "triton") and own and before.gain is not None:
        return normalised_codes(
            rows, before.gain, before.eps, gate=gate, activation=before.activation
        )
    side = side_implementation(implementation)
    rows = apply_prologue(rows, replace(before, gate=gate), implementation=side)
    rows = turned_input(rows, name, ste)
    codes, act_scale = activation_codes(lax.stop_gradient(rows), name, ste)
    return codes.astype(jnp.int8), act_scale, rows


_Operands = tuple[jax.Array, jax.Array, tuple[TernaryWeight, ...]]
_Residuals = tuple[jax.Array, _Operands, tuple[jax.Array, ...] | None]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _products(
    how: Products, x: jax.Array, weights: tuple[jax.Array, ...], operands: _Operands
) -> tuple[jax.Array, ...]:
    """Outputs [m, n_i]; ``x`` [m, k] and ``weights`` are there for gradients."""
    del weights
    codes, act_scale, packed = operands
    return ternary_linear_of_codes(
        codes, act_scale, packed, x.dtype, implementation=how.implementation
    )


def _products_fwd(
    how: Products, x: jax.Array, weights: tuple[jax.Array, ...], operands: _Operands
) -> tuple[tuple[jax.Array, ...], _Residuals]:
    # An empty array says the dtype of x without keeping x.
    outputs = cast(tuple[jax.Array, ...], _products(how, x, weights, operands))
    return outputs, (x[..., :0], operands, weights if how.clipped else None)


def _products_bwd(
    how: Products, residuals: _Residuals, gradients: tuple[jax.Array, ...]
) -> tuple[jax.Array, tuple[jax.Array, ...], None]:
    like, (codes, act_scale, packed), weights = residuals
    dx = ternary_linear_transposed(
        gradients,
        packed,
        implementation=how.implementation,
        gradient_bits=how.gradient_bits,
    )
    values = (codes.astype(jnp.float32) / act_scale).astype(like.dtype)
    dw = [general_dot(g, values, (((0,), (0,)), ((), ())), jnp.float32) for g in gradients]
    if weights is not None:
        dw = [
            jnp.where(jnp.abs(weight) <= one.scale, grad, 0.0)
            for weight, one, grad in zip(weights, packed, dw, strict=True)
        ]
    return dx.astype(like.dtype), tuple(dw), None


_products.defvjp(_products_fwd, _products_bwd)
