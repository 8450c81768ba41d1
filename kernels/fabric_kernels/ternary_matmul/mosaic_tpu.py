"""The TPU implementation: Pallas kernels that unpack in registers and multiply on the MXU.

Rows of a block of packed bytes lie along sublanes, four to a 32-bit word, so that shifting and
masking words gives a *plane*, the codes of one field of each byte, without moving anything: plane j
of ``ternary2`` holds k = 4i + j. A product with the matrix is the sum of products with its planes,
and nothing of the weight is ever interleaved. It is the activations whose columns are put in the
order of planes, once a call, and the gradient's back in the order of k: products with a permutation
matrix, exact, at M·K·512 operations, where XLA would transpose through memory. The planes of
``ternary1.6`` are contiguous in k already.

Integer products read codes + 1, which is what is stored, and subtract the sum of the row. Chips
with an int8 MXU (v5e, v5p, v6e) add in int32. Others multiply the same numbers as bfloat16, exact
too: the float32 sum of one block stays below 2^24 and is added up in int32. Float operands are
bfloat16, or float32 in three bfloat16 parts, which together have all of its bits.

All was compiled ahead of time and tested in Pallas' interpreter; none of it has run on a TPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fabric_kernels.absmax import absmax_quantize
from fabric_kernels.packing import CODES_PER_BYTE, DIGITS_PER_BYTE, Packing
from fabric_kernels.ternary_matmul.weight import TernaryWeight

LANES = 128
CHUNK = CODES_PER_BYTE * LANES
"""Columns of ``ternary2`` whose bytes fill the lanes of a register: they are permuted together."""
BLOCK_M = 256
# A multiple of 128 lanes of the output; sizes that divide N come first.
BLOCKS_N = (512, 640, 384, 256)
# Packed bytes of a row. Larger blocks hide the 0.35 µs of a grid step, smaller ones fit in VMEM.
BLOCK_W = 1024
FLOAT32_PARTS = 3


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a call is compiled for.

    Attributes:
        int8: the MXU multiplies int8.
        interpret: run in Pallas' interpreter, on any device.
    """

    int8: bool
    interpret: bool = False


def default_target() -> Target:
    """Of the first device; elsewhere than on a TPU Pallas raises, unless its interpreter is on."""
    kind = jax.devices()[0].device_kind
    return Target(int8=not kind.startswith("TPU") or "v5" in kind or "v6" in kind)


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Blocks of a product of [M, K] with [N, W] bytes, and how many there are of each."""

    planes: int
    bm: int
    bn: int
    bw: int
    mt: int
    nt: int
    wt: int

    @property
    def width(self) -> int:
        """Columns of a plane, pads included."""
        return self.bw * self.wt


def linear(
    x: jax.Array, weights: Sequence[TernaryWeight], *, target: Target | None = None
) -> tuple[jax.Array, ...]:
    """``scale · (q(x) · codes^T)`` for each weight, in the dtype of ``x`` [..., K]."""
    target = target or default_target()
    codes, act_scale = absmax_quantize(x)
    rows = codes.reshape(-1, x.shape[-1])
    planes: jax.Array | None = None
    outputs: list[jax.Array] = []
    for weight in weights:
        tiling = _tiling(rows.shape[0], weight)
        # Weights of a call share K and so the planes of the activations.
        planes = _to_planes(rows, tiling, weight.packing, target) if planes is None else planes
        scales = (_row_sums(rows), act_scale.reshape(-1, 1))
        y = _forward(planes, weight, tiling, target, _kernel_float(x.dtype), *scales)
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
    tiling = _tiling(rows.shape[0], weight)
    y = _forward(_to_planes(rows, tiling, weight.packing, target), weight, tiling, target, out, sums)
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
        _transposed(g, weight, _scale(weight), target)
        for g, weight in zip(gradients, weights, strict=True)
    ]
    return sum(parts[1:], parts[0])


def matmul_transposed(
    g: jax.Array, weight: TernaryWeight, *, target: Target | None = None
) -> jax.Array:
    """``g[..., n] · codes`` in the dtype of ``g``."""
    return _transposed(g, weight, jnp.ones((1,), jnp.float32), target or default_target())


def _tiling(m: int, weight: TernaryWeight) -> Tiling:
    n, width = weight.packed.shape[-2:]
    mt = max(1, -(-m // BLOCK_M))
    bm = m if mt == 1 else _round_up(-(-m // mt), 32)
    padded = _round_up(n, LANES)
    fitting = [bn for bn in BLOCKS_N if padded % bn == 0]
    bn = fitting[0] if fitting else min(padded, BLOCKS_N[0])
    wt = -(-width // BLOCK_W)
    bw = _round_up(-(-width // wt), LANES)
    planes = CODES_PER_BYTE if weight.packing == "ternary2" else DIGITS_PER_BYTE
    return Tiling(planes=planes, bm=bm, bn=bn, bw=bw, mt=mt, nt=-(-n // bn), wt=wt)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _row_sums(rows: jax.Array) -> jax.Array:
    return jnp.sum(rows.astype(jnp.int32), axis=-1, keepdims=True)


def _scale(weight: TernaryWeight) -> jax.Array:
    """float32 [1]."""
    scale = weight.scale
    if scale.ndim:
        assert weight.layer is not None
        scale = lax.dynamic_index_in_dim(scale, weight.layer, keepdims=False)
    return scale.reshape(1)


def _stack(weight: TernaryWeight) -> tuple[jax.Array, jax.Array]:
    """The layer's index, int32 [1], and uint8 [L, N, W]: blocks are read where they lie."""
    if weight.layer is None:
        return jnp.zeros((1,), jnp.int32), weight.packed[None]
    return weight.layer.astype(jnp.int32).reshape(1), weight.packed


def _split(x: jax.Array) -> list[jax.Array]:
    """Three float32 that bfloat16 holds and whose sum is ``x``, by cutting off bits.

    Rounding to bfloat16 and back is what XLA simplifies away.
    """
    parts: list[jax.Array] = []
    for _ in range(FLOAT32_PARTS):
        bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536)
        parts.append(lax.bitcast_convert_type(bits, jnp.float32))
        x = x - parts[-1]
    return parts


def _bfloat16_parts(rows: jax.Array) -> jax.Array:
    """[M, K] of bfloat16, or [3M, K] for what has more bits."""
    if rows.dtype == jnp.bfloat16:
        return rows
    return jnp.concatenate(_split(rows.astype(jnp.float32))).astype(jnp.bfloat16)


def _kernel_float(dtype: Any) -> Any:
    """What a kernel writes where the result is of ``dtype``: Mosaic has no float16."""
    return jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32


def _sum_parts(y: jax.Array, dtype: jnp.dtype) -> jax.Array:
    if dtype == jnp.bfloat16:
        return y.astype(dtype)
    # The small parts first.
    return jnp.sum(y.reshape(FLOAT32_PARTS, -1, y.shape[-1])[::-1], axis=0).astype(dtype)


def _permutation(dtype: Any) -> jax.Array:
    """[512, 512], takes column 4i + j to 128j + i."""
    order = np.arange(CHUNK)
    matrix = np.zeros((CHUNK, CHUNK), np.int8)
    matrix[order, order % CODES_PER_BYTE * LANES + order // CODES_PER_BYTE] = 1
    return jnp.asarray(matrix, dtype)


def _to_planes(rows: jax.Array, tiling: Tiling, packing: Packing, target: Target) -> jax.Array:
    """[M, K] to [planes, M, width], columns past K zero."""
    m, k = rows.shape
    t = tiling
    if packing == "ternary1.6":
        digit = -(-k // t.planes)
        rows = jnp.pad(rows, ((0, 0), (0, t.planes * digit - k)))
        planes = rows.reshape(m, t.planes, digit).swapaxes(0, 1)
        return jnp.pad(planes, ((0, 0), (0, 0), (0, t.width - digit)))
    rows = jnp.pad(rows, ((0, 0), (0, t.planes * t.width - k)))
    as_int8 = rows.dtype == jnp.int8 and target.int8
    order = _permutation(jnp.int8 if as_int8 else jnp.bfloat16)
    return pl.pallas_call(
        _permute_kernel,
        grid=(t.mt, t.wt),
        in_specs=[
            pl.BlockSpec((t.bm, t.planes * t.bw), lambda m, w: (m, w)),
            pl.BlockSpec((CHUNK, CHUNK), lambda m, w: (0, 0)),
        ],
        out_specs=pl.BlockSpec((t.planes, t.bm, t.bw), lambda m, w: (0, m, w)),
        out_shape=jax.ShapeDtypeStruct((t.planes, m, t.width), rows.dtype),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows.size * CHUNK, bytes_accessed=2 * rows.nbytes, transcendentals=0
        ),
        interpret=target.interpret,
        name="ternary_permute",
    )(rows, order)


def _permute_kernel(x: Any, order: Any, out: Any) -> None:
    total = jnp.int32 if order.dtype == jnp.int8 else jnp.float32
    for chunk in range(x.shape[1] // CHUNK):
        columns = x[:, chunk * CHUNK : (chunk + 1) * CHUNK].astype(order.dtype)
        y = _dot(columns, order[...], 0, total)
        if out.dtype == jnp.int8:
            y = y.astype(jnp.int32)
        for j in range(CODES_PER_BYTE):
            at = slice(chunk * LANES, (chunk + 1) * LANES)
            out[j, :, at] = y[:, j * LANES : (j + 1) * LANES].astype(out.dtype)


def _dot(x: jax.Array, y: jax.Array, axis: int, total: Any) -> jax.Array:
    """Contracts the last axis of ``x`` with ``axis`` of ``y``."""
    return lax.dot_general(x, y, (((1,), (axis,)), ((), ())), preferred_element_type=total)


def _unpack(packed: jax.Array, planes: int) -> list[jax.Array]:
    """uint8 [n, w] to planes: int32 [n / 4, w] that hold four codes + 1 each, in a byte each."""
    words = pltpu.bitcast(packed, jnp.int32)
    if planes == CODES_PER_BYTE:
        return [
            lax.shift_right_logical(words, jnp.full_like(words, 2 * j)) & 0x03030303
            for j in range(planes)
        ]
    # Fractions of 256, two to a word: tripled, each carries its next digit into the byte above.
    even = words & 0x00FF00FF
    odd = lax.shift_right_logical(words, jnp.full_like(words, 8)) & 0x00FF00FF
    digits: list[jax.Array] = []
    for _ in range(planes):
        even, odd = even + even + even, odd + odd + odd
        low = lax.shift_right_logical(even, jnp.full_like(even, 8)) & 0x00030003
        digits.append(low | (odd & 0x03000300))
        even, odd = even & 0x00FF00FF, odd & 0x00FF00FF
    return digits


def _signed(plane: jax.Array) -> jax.Array:
    """Codes, bfloat16 [n, w], from words of codes + 1; no byte carries into the next."""
    shifted = (plane + 0x7F7F7F7F) ^ jnp.int32(-0x7F7F7F80)
    return pltpu.bitcast(shifted, jnp.int8).astype(jnp.bfloat16)


def _forward(
    planes: jax.Array,
    weight: TernaryWeight,
    tiling: Tiling,
    target: Target,
    dtype: Any,
    sums: jax.Array | None = None,
    act_scale: jax.Array | None = None,
) -> jax.Array:
    """[planes, M, width] by the matrix: [M, N] of ``dtype``; with ``act_scale`` times the scales.

    ``sums`` [M, 1] are those of the rows where they are integers.
    """
    t, m, n = tiling, planes.shape[1], weight.n
    layer, stack = _stack(weight)
    per_row = pl.BlockSpec((t.bm, 1), lambda m, n, w, layer: (m, 0))
    operands, specs = [planes, stack], [
        pl.BlockSpec((t.planes, t.bm, t.bw), lambda m, n, w, layer: (0, m, w)),
        pl.BlockSpec((None, t.bn, t.bw), lambda m, n, w, layer: (layer[0], n, w)),
    ]
    if sums is not None:
        operands, specs = [*operands, sums], [*specs, per_row]
    if act_scale is not None:
        operands = [*operands, act_scale, _scale(weight)]
        specs = [*specs, per_row, pl.BlockSpec(memory_space=pltpu.SMEM)]
    total = jnp.float32 if sums is None else jnp.int32
    return _call(
        partial(_forward_kernel, int8=target.int8),
        tiling,
        target,
        grid=(t.mt, t.nt, t.wt),
        in_specs=specs,
        out_specs=pl.BlockSpec((t.bm, t.bn), lambda m, n, w, layer: (m, n)),
        out_shape=jax.ShapeDtypeStruct((m, n), dtype),
        scratch=pltpu.VMEM((t.bm, t.bn), total),
        name="ternary_forward",
    )(layer, *operands)


def _forward_kernel(layer: Any, x: Any, packed: Any, *refs: Any, int8: bool) -> None:
    """``refs``: the sums of rows, the scales of activations and weight, as there are; out, acc."""
    del layer
    *rest, out, acc = refs
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        acc[...] = jnp.zeros_like(acc)

    total = acc[...]
    block: jax.Array | None = None
    for j, plane in enumerate(_unpack(packed[...], x.shape[0])):
        if not rest:
            part = _dot(x[j], _signed(plane), 1, jnp.float32)
        elif int8:
            part = _dot(x[j], pltpu.bitcast(plane, jnp.int8), 1, jnp.int32)
        else:
            codes = pltpu.bitcast(plane, jnp.int8).astype(jnp.bfloat16)
            part = _dot(x[j].astype(jnp.bfloat16), codes, 1, jnp.float32)
        block = part if block is None else block + part
    assert block is not None
    acc[...] = total + block.astype(acc.dtype)

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        y = acc[...] - rest[0][...] if rest else acc[...]
        if len(rest) > 1:
            y = y.astype(jnp.float32) / rest[1][...] * rest[2][0]
        out[...] = y.astype(out.dtype)


def _transposed(
    g: jax.Array, weight: TernaryWeight, scale: jax.Array, target: Target
) -> jax.Array:
    """``scale · (g[..., n] · codes)`` in the dtype of ``g``."""
    rows = _bfloat16_parts(g.reshape(-1, g.shape[-1]))
    m, k = rows.shape[0], weight.k
    t = _tiling(m, weight)
    rows = jnp.pad(rows, ((0, 0), (0, t.nt * t.bn - weight.n)))
    layer, stack = _stack(weight)
    if weight.packing == "ternary2":
        out_spec = pl.BlockSpec((t.bm, t.planes * t.bw), lambda m, w, n, layer: (m, w))
        shape = (m, k)
    else:
        out_spec = pl.BlockSpec((t.planes, t.bm, t.bw), lambda m, w, n, layer: (0, m, w))
        shape = (t.planes, m, stack.shape[-1])
    dx = _call(
        _transposed_kernel,
        t,
        target,
        grid=(t.mt, t.wt, t.nt),
        in_specs=[
            pl.BlockSpec((t.bm, t.bn), lambda m, w, n, layer: (m, n)),
            pl.BlockSpec((None, t.bn, t.bw), lambda m, w, n, layer: (layer[0], n, w)),
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((CHUNK, CHUNK), lambda m, w, n, layer: (0, 0)),
        ],
        out_specs=out_spec,
        out_shape=jax.ShapeDtypeStruct(shape, _kernel_float(g.dtype)),
        scratch=pltpu.VMEM((t.planes, t.bm, t.bw), jnp.float32),
        name="ternary_transposed",
    )(layer, rows, stack, scale, _permutation(jnp.bfloat16).T)
    if weight.packing == "ternary1.6":
        dx = dx.swapaxes(0, 1).reshape(m, -1)[:, :k]
    return _sum_parts(dx, g.dtype).reshape(*g.shape[:-1], k)


def _transposed_kernel(
    layer: Any, g: Any, packed: Any, scale: Any, order: Any, out: Any, acc: Any
) -> None:
    del layer
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        acc[...] = jnp.zeros_like(acc)

    for j, plane in enumerate(_unpack(packed[...], acc.shape[0])):
        acc[j] += _dot(g[...], _signed(plane), 0, jnp.float32)

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        if len(out.shape) == 3:
            out[...] = (acc[...] * scale[0]).astype(out.dtype)
            return
        for chunk in range(acc.shape[2] // LANES):
            at = slice(chunk * LANES, (chunk + 1) * LANES)
            y = jnp.concatenate([acc[j, :, at] for j in range(CODES_PER_BYTE)], axis=1) * scale[0]
            parts = [y] if out.dtype == jnp.bfloat16 else _split(y)[::-1]
            moved = [_dot(p.astype(jnp.bfloat16), order[...], 0, jnp.float32) for p in parts]
            out[:, chunk * CHUNK : (chunk + 1) * CHUNK] = sum(moved[1:], moved[0]).astype(out.dtype)


def _call(
    kernel: Any,
    tiling: Tiling,
    target: Target,
    *,
    grid: tuple[int, int, int],
    in_specs: list[Any],
    out_specs: Any,
    out_shape: jax.ShapeDtypeStruct,
    scratch: Any,
    name: str,
) -> Any:
    """A kernel whose last grid axis adds up; its first operand is the layer's index."""
    t = tiling
    m, n, codes = t.bm * t.mt, t.bn * t.nt, t.planes * t.width
    traffic = m * codes + t.mt * n * t.width + 2 * m * n
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[scratch],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * n * codes, bytes_accessed=traffic, transcendentals=0
        ),
        interpret=target.interpret,
        name=name,
    )
