"""The linear maps of frozen packed matrices, with the gradient that flows through them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from fabric_kernels import (
    LowRank,
    Packing,
    Prologue,
    TernaryWeight,
    low_rank_product,
    ternary_linear,
    ternary_matmul,
    with_gradient_of,
)
from fabric_kernels.ternary_matmul import GradientBits, Implementation
from jaxtyping import Array, Float, Float32, UInt8

from fabric_jax.quantization.absmax import ActQuant
from fabric_jax.quantization.straight_through import fake_quantize_activation


def packed_linear(
    x: Float[Array, "*batch k"],
    packed: UInt8[Array, "n w"],
    scale: Float32[Array, ""],
    *,
    packing: Packing = "ternary2",
    act_quant: ActQuant = "per_token",
    implementation: Implementation | None = None,
    gradient_bits: GradientBits = 16,
) -> Float[Array, "*batch n"]:
    """``scale · (q(x) · codes^T)`` for one matrix; see :func:`packed_linears`."""
    weight = TernaryWeight(packed, scale, None, x.shape[-1], packing)
    return packed_linears(
        x,
        [weight],
        act_quant=act_quant,
        implementation=implementation,
        gradient_bits=gradient_bits,
    )[0]


def packed_linears(
    x: Float[Array, "*batch k"],
    weights: Sequence[TernaryWeight],
    adapters: Sequence[LowRank | None] | None = None,
    *,
    prologue: Prologue | None = None,
    residual: Float[Array, "*batch n"] | None = None,
    kept: Float[Array, "*batch k"] | None = None,
    act_quant: ActQuant = "per_token",
    implementation: Implementation | None = None,
    gradient_bits: GradientBits = 16,
) -> tuple[Float[Array, "*batch n"], ...]:
    """``scale · (q(x) · codes^T)`` for matrices that share an input, in the dtype of ``x``.

    An adapter's product, of the un-quantised ``x``, is added where there is one.

    Per token the products are exact: int8 codes times ternary codes accumulate in int32, and one
    float32 multiplication by both scales follows. Backward: ``dx = sum scale · (g · codes)``, the
    quantiser counting as identity; the packed matrices and their scales get no gradient. Where
    ``kept`` is given, the backward pass reads it in place of ``x`` and the gradient goes to it. A
    ``prologue`` happens to ``x`` first, and the output of the only matrix is added to a
    ``residual``; both go with the quantiser ``per_token`` alone.
    """
    if act_quant == "per_token":
        return ternary_linear(
            x,
            weights,
            adapters,
            prologue=prologue,
            residual=residual,
            kept=kept,
            implementation=implementation,
            gradient_bits=gradient_bits,
        )
    if prologue is not None or residual is not None:
        raise ValueError(
            f"prologues and residuals go with the quantiser 'per_token', found {act_quant!r}"
        )
    base_input = x if kept is None else with_gradient_of(x, kept)
    values = fake_quantize_activation(base_input, act_quant)
    outputs: list[jax.Array] = []
    for weight, adapter in zip(weights, adapters or [None] * len(weights), strict=True):
        one = weight.single()
        product = ternary_matmul(
            values, one.packed, packing=one.packing, implementation=implementation
        )
        scaled = product.astype(jnp.float32) * jax.lax.stop_gradient(one.scale)
        y = scaled.astype(x.dtype)
        outputs.append(y if adapter is None else y + low_rank_product(x, adapter, kept=kept))
    return tuple(outputs)
