"""The TPU implementation: Pallas kernels that unpack in registers and multiply on the MXU.

Rows of a block of packed bytes lie along sublanes, four to a 32-bit word, so that shifting and
masking words gives a *plane*, the codes of one field of each byte, without moving anything; nor
does the order of bytes in a word matter. Plane j of ``ternary2`` holds k = 4i + j. A product with
the matrix is the sum of products with its planes, and nothing of the weight is ever interleaved. It
is the activations whose columns are put in the order of planes, once a call, and the gradient's
back in the order of k: products with a permutation matrix, exact, 512 multiplications an element,
where XLA would transpose through memory. The planes of ``ternary1.6`` are contiguous in k already.

Integer products read codes + 1, which is what is stored, and subtract the sum of the row. Chips
with an int8 MXU (v5e, v5p, v6e) add in int32. Others multiply the same numbers as bfloat16, exact
too: the float32 sum of one block stays below 2^24 and is added up in int32. Float operands are
bfloat16, or float32 in three bfloat16 parts, which together have all of its bits.

All was compiled ahead of time and tested in Pallas' interpreter; none of it has run on a TPU.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fabric_kernels.absmax import absmax_quantize
from fabric_kernels.packing import Packing
from fabric_kernels.ternary_matmul.mosaic_tpu_blocks import Target as Target
from fabric_kernels.ternary_matmul.mosaic_tpu_blocks import Tiling, tiling_of
from fabric_kernels.ternary_matmul.mosaic_tpu_kernels import (
    FLOAT32_PARTS,
    forward,
    permute,
    scale_of,
    split_float32,
    transposed,
)
from fabric_kernels.ternary_matmul.weight import TernaryWeight


def default_target() -> Target:
    """Of the first device; elsewhere than on a TPU Pallas raises, unless its interpreter is on."""
    kind = jax.devices()[0].device_kind
    return Target(int8=not kind.startswith("TPU") or "v5" in kind or "v6" in kind)


def linear(
    x: jax.Array, weights: Sequence[TernaryWeight], *, target: Target | None = None
) -> tuple[jax.Array, ...]:
    """``scale · (q(x) · codes^T)`` for each weight, in the dtype of ``x`` [..., K]."""
    target = target or default_target()
    if x.size == 0:
        return tuple(jnp.zeros((*x.shape[:-1], weight.n), x.dtype) for weight in weights)
    codes, act_scale = absmax_quantize(x)
    rows = codes.reshape(-1, x.shape[-1])
    planes: jax.Array | None = None
    outputs: list[jax.Array] = []
    for weight in weights:
        tiling = tiling_of(rows.shape[0], weight)
        # Weights of a call share K and so the planes of the activations.
        planes = _to_planes(rows, tiling, weight.packing, target) if planes is None else planes
        scales = (_row_sums(rows), act_scale.reshape(-1, 1))
        y = forward(planes, weight, tiling, target, _kernel_float(x.dtype), *scales)
        outputs.append(y.astype(x.dtype).reshape(*x.shape[:-1], -1))
    return tuple(outputs)


def matmul(x: jax.Array, weight: TernaryWeight, *, target: Target | None = None) -> jax.Array:
    """``x[..., k] · codes[n, k]^T``: int32 for int8 ``x``, else in the dtype of ``x``."""
    target = target or default_target()
    rows = x.reshape(-1, x.shape[-1])
    sums = None
    if jnp.issubdtype(x.dtype, jnp.integer):
        rows, out, sums = rows.astype(jnp.int8), jnp.int32, _row_sums(rows)
    else:
        rows, out = _bfloat16_parts(rows), _kernel_float(x.dtype)
    if x.size == 0:
        return jnp.zeros((*x.shape[:-1], weight.n), out).astype(x.dtype if sums is None else out)
    tiling = tiling_of(rows.shape[0], weight)
    y = forward(_to_planes(rows, tiling, weight.packing, target), weight, tiling, target, out, sums)
    if sums is None:
        y = _sum_parts(y, x.dtype)
    return y.reshape(*x.shape[:-1], -1)


def linear_transposed(
    gradients: Sequence[jax.Array],
    weights: Sequence[TernaryWeight],
    *,
    target: Target | None = None,
) -> jax.Array:
    """``sum_i scale_i · (g_i[..., n_i] · codes_i)`` in the dtype of the first."""
    target = target or default_target()
    parts = [
        _transposed(g, weight, scale_of(weight), target)
        for g, weight in zip(gradients, weights, strict=True)
    ]
    return sum(parts[1:], parts[0])


def matmul_transposed(
    g: jax.Array, weight: TernaryWeight, *, target: Target | None = None
) -> jax.Array:
    """``g[..., n] · codes`` in the dtype of ``g``."""
    return _transposed(g, weight, jnp.ones((1,), jnp.float32), target or default_target())


def _row_sums(rows: jax.Array) -> jax.Array:
    return jnp.sum(rows.astype(jnp.int32), axis=-1, keepdims=True)


def _bfloat16_parts(rows: jax.Array) -> jax.Array:
    """[M, K] of bfloat16, or [3M, K] for what has more bits."""
    if rows.dtype == jnp.bfloat16:
        return rows
    return jnp.concatenate(split_float32(rows.astype(jnp.float32))).astype(jnp.bfloat16)


def _sum_parts(y: jax.Array, dtype: jnp.dtype) -> jax.Array:
    if dtype == jnp.bfloat16:
        return y.astype(dtype)
    # The small parts first.
    return jnp.sum(y.reshape(FLOAT32_PARTS, -1, y.shape[-1])[::-1], axis=0).astype(dtype)


def _to_planes(rows: jax.Array, tiling: Tiling, packing: Packing, target: Target) -> jax.Array:
    """[M, K] to [planes, M, width], columns past K zero."""
    m, k = rows.shape
    t = tiling
    if packing == "ternary1.6":
        digit = -(-k // t.planes)
        rows = jnp.pad(rows, ((0, 0), (0, t.planes * digit - k)))
        planes = rows.reshape(m, t.planes, digit).swapaxes(0, 1)
        return jnp.pad(planes, ((0, 0), (0, 0), (0, t.width - digit)))
    return permute(jnp.pad(rows, ((0, 0), (0, t.planes * t.width - k))), t, target)


def _kernel_float(dtype: jnp.dtype) -> jnp.dtype:
    """What a kernel writes where the result is of ``dtype``: Mosaic has no float16."""
    return jnp.dtype(jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32)


def _transposed(g: jax.Array, weight: TernaryWeight, scale: jax.Array, target: Target) -> jax.Array:
    """``scale · (g[..., n] · codes)`` in the dtype of ``g``."""
    if g.size == 0:
        return jnp.zeros((*g.shape[:-1], weight.k), g.dtype)
    rows = _bfloat16_parts(g.reshape(-1, g.shape[-1]))
    t = tiling_of(rows.shape[0], weight)
    dx = transposed(rows, weight, scale, t, target, _kernel_float(g.dtype))
    if weight.packing == "ternary1.6":
        dx = dx.swapaxes(0, 1).reshape(rows.shape[0], -1)[:, : weight.k]
    return _sum_parts(dx, g.dtype).reshape(*g.shape[:-1], weight.k)
