"""Products of activations that are codes already: what training from scratch asks for.

Its backward pass reads the codes again, so quantiser and products are two calls there.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fabric_kernels.absmax import scale_sums
from fabric_kernels.packing import unpack
from fabric_kernels.ternary_matmul.select import (
    Implementation,
    products,
    resolve,
    select_implementation,
)
from fabric_kernels.ternary_matmul.weight import TernaryWeight
from fabric_kernels.triton_call import kernel_module, on_platform

LONG_SUMS = 2048
"""Channels from which the Hopper kernel is the faster one of the two that scale and store."""


def ternary_linear_of_codes(
    codes: jax.Array,
    act_scale: jax.Array,
    weights: Sequence[TernaryWeight],
    dtype: DTypeLike,
    *,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, ...]:
    """``scale · (codes · codes_i^T) / act_scale`` for each weight; no gradient is defined.

    Exact int32 sums, one float32 multiplication by both scales, one rounding to ``dtype``: the bits
    of ``ternary_linear`` of the input that the codes were made of.

    Args:
        codes: int8 [..., K], of ``absmax_quantize``.
        act_scale: float32 [..., 1], which divides them.
        weights: matrices with the same K.
        dtype: of the outputs, a float.
        implementation: which one to run; ``None`` picks. A named one runs or raises.

    Raises:
        TypeError: ``codes`` is not int8, a weight not uint8 or a scale not float32.
        ValueError: a weight has another K, or a name is unknown.
    """
    chosen = select_implementation(implementation)
    if codes.dtype != jnp.int8:
        raise TypeError(f"ternary_linear_of_codes takes int8 codes, found {codes.dtype}")
    outputs: list[jax.Array] = []
    for weight in weights:
        weight.check()
        if weight.k != codes.shape[-1]:
            raise ValueError(f"expected weights of K = {codes.shape[-1]}, found {weight.k}")
        one = weight.single()
        name = resolve(chosen, "linear", codes.size // max(codes.shape[-1], 1), one)
        run: Any = products(name)
        if name in ("mosaic_gpu", "triton") and codes.size > 0 and one.packing == "ternary2":
            outputs.append(_on_gpu(name, codes, act_scale, one, jnp.dtype(dtype)))
            continue
        sums = cast(jax.Array, run.matmul(codes, one))
        outputs.append(scale_sums(sums, act_scale, one.scale).astype(dtype))
    return tuple(outputs)


def _on_gpu(
    name: str, codes: jax.Array, act_scale: jax.Array, weight: TernaryWeight, dtype: jnp.dtype
) -> jax.Array:
    """By kernels that scale and round before they store."""
    if name == "mosaic_gpu" and weight.k >= LONG_SUMS:
        return cast(Any, products(name)).scaled(codes, act_scale, weight, dtype)
    kernels = kernel_module("fabric_kernels.ternary_matmul.triton_codes")
    rows = codes.reshape(-1, codes.shape[-1])
    factor = ((1.0 / act_scale) * weight.scale).reshape(-1)
    unpacked = unpack(weight.packed, weight.k, weight.packing)
    tile = kernels.Tile(k=min(128, max(32, 1 << (weight.k - 1).bit_length())))
    call = partial(kernels.scaled, dtype, tile)
    y = on_platform(call, rows, unpacked, factor)
    return y.reshape(*codes.shape[:-1], weight.n)
