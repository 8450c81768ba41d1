"""The Pallas calls of ``mosaic_tpu``: permuting columns, and the product each way round.

Shapes: activations [M, K], a stack of packed matrices uint8 [L, N, W] read at a layer, planes
[P, M, width] with P codes in a byte and width W rounded up to whole blocks.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fabric_kernels.absmax import scale_sums
from fabric_kernels.packing import CODES_PER_BYTE
from fabric_kernels.ternary_matmul.mosaic_tpu_blocks import LANES, Target, Tiling
from fabric_kernels.ternary_matmul.weight import TernaryWeight

CHUNK = CODES_PER_BYTE * LANES
"""Columns of ``ternary2`` whose bytes fill the lanes of a register: they are permuted together."""
FLOAT32_PARTS = 3


def split_float32(x: jax.Array) -> list[jax.Array]:
    """Three float32 that bfloat16 holds and whose sum is ``x``, largest first, by cutting off bits.

    Rounding to bfloat16 and back is what XLA simplifies away.
    """
    parts: list[jax.Array] = []
    for _ in range(FLOAT32_PARTS):
        bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536)
        parts.append(lax.bitcast_convert_type(bits, jnp.float32))
        x = x - parts[-1]
    return parts


def scale_of(weight: TernaryWeight) -> jax.Array:
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


def _permutation(dtype: Any) -> jax.Array:
    """[512, 512], takes column 4i + j to 128j + i."""
    column = np.arange(CHUNK)
    matrix = np.zeros((CHUNK, CHUNK), np.int8)
    matrix[column, column % CODES_PER_BYTE * LANES + column // CODES_PER_BYTE] = 1
    return jnp.asarray(matrix, dtype)


def permute(rows: jax.Array, tiling: Tiling, target: Target) -> jax.Array:
    """int8 or bfloat16 [M, 4 width] to its planes of ``ternary2``, [4, M, width]."""
    m, t = rows.shape[0], tiling
    as_int8 = rows.dtype == jnp.int8 and target.int8
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
    )(rows, _permutation(jnp.int8 if as_int8 else jnp.bfloat16))


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


def forward(
    planes: jax.Array,
    weight: TernaryWeight,
    tiling: Tiling,
    target: Target,
    dtype: Any,
    sums: jax.Array | None = None,
    act_scale: jax.Array | None = None,
) -> jax.Array:
    """Planes [P, M, width] by the transpose of the matrix: [M, N] of ``dtype``.

    Args:
        planes: of the activations, int8 or bfloat16.
        weight: the matrix.
        tiling: as for ``planes``.
        target: what for.
        dtype: of the result.
        sums: int32 [M, 1], of each row, where the activations are int8.
        act_scale: float32 [M, 1], of the activations; None for the bare product.
    """
    t, n = tiling, weight.n
    layer, stack = _stack(weight)
    per_row = pl.BlockSpec((t.bm, 1), lambda m, n, w, layer: (m, 0))
    operands = [planes, stack]
    specs = [
        pl.BlockSpec((t.planes, t.bm, t.bw), lambda m, n, w, layer: (0, m, w)),
        pl.BlockSpec((None, t.bn, t.bw), lambda m, n, w, layer: (layer[0], n, w)),
    ]
    if sums is not None:
        operands, specs = [*operands, sums], [*specs, per_row]
    if act_scale is not None:
        operands = [*operands, act_scale, scale_of(weight)]
        specs = [*specs, per_row, pl.BlockSpec(memory_space=pltpu.SMEM)]
    return _call(
        partial(_forward_kernel, int8=target.int8),
        tiling,
        target,
        grid=(t.mt, t.nt, t.wt),
        in_specs=specs,
        out_specs=pl.BlockSpec((t.bm, t.bn), lambda m, n, w, layer: (m, n)),
        out_shape=jax.ShapeDtypeStruct((planes.shape[1], n), dtype),
        scratch=pltpu.VMEM((t.bm, t.bn), jnp.float32 if sums is None else jnp.int32),
        name="ternary_forward",
    )(layer, *operands)


def _forward_kernel(layer: Any, x: Any, packed: Any, *refs: Any, int8: bool) -> None:
    """``refs``: sums of rows and both scales, where there are any; then the result and the sum."""
    del layer
    *rest, out, acc = refs
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        acc[...] = jnp.zeros_like(acc)

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
    acc[...] += block.astype(acc.dtype)

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        y = acc[...] - rest[0][...] if rest else acc[...]
        if len(rest) > 1:
            _, act_scale, scale = rest
            y = scale_sums(y, act_scale[...], scale[0])
        out[...] = y.astype(out.dtype)


def transposed(
    rows: jax.Array,
    weight: TernaryWeight,
    scale: jax.Array,
    tiling: Tiling,
    target: Target,
    dtype: Any,
) -> jax.Array:
    """``scale [1] · (rows[M, N] · codes)`` of bfloat16 rows.

    Returns:
        For ``ternary2`` [M, K], for ``ternary1.6`` planes [5, M, W], of ``dtype``.
    """
    t, m = tiling, rows.shape[0]
    rows = jnp.pad(rows, ((0, 0), (0, t.nt * t.bn - weight.n)))
    layer, stack = _stack(weight)
    operands = [rows, stack, scale]
    specs = [
        pl.BlockSpec((t.bm, t.bn), lambda m, w, n, layer: (m, n)),
        pl.BlockSpec((None, t.bn, t.bw), lambda m, w, n, layer: (layer[0], n, w)),
        pl.BlockSpec(memory_space=pltpu.SMEM),
    ]
    out_spec = pl.BlockSpec((t.planes, t.bm, t.bw), lambda m, w, n, layer: (0, m, w))
    shape: tuple[int, ...] = (t.planes, m, stack.shape[-1])
    if weight.packing == "ternary2":
        operands = [*operands, _permutation(jnp.bfloat16).T]
        specs = [*specs, pl.BlockSpec((CHUNK, CHUNK), lambda m, w, n, layer: (0, 0))]
        out_spec = pl.BlockSpec((t.bm, t.planes * t.bw), lambda m, w, n, layer: (m, w))
        shape = (m, weight.k)
    return _call(
        _transposed_kernel,
        t,
        target,
        grid=(t.mt, t.wt, t.nt),
        in_specs=specs,
        out_specs=out_spec,
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
        scratch=pltpu.VMEM((t.planes, t.bm, t.bw), jnp.float32),
        name="ternary_transposed",
    )(layer, *operands)


def _transposed_kernel(layer: Any, g: Any, packed: Any, scale: Any, *refs: Any) -> None:
    """``refs``: the permutation of ``ternary2``; then the result and the sum."""
    del layer
    *rest, out, acc = refs
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        acc[...] = jnp.zeros_like(acc)

    for j, plane in enumerate(_unpack(packed[...], acc.shape[0])):
        acc[j] += _dot(g[...], _signed(plane), 0, jnp.float32)

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        if not rest:
            out[...] = (acc[...] * scale[0]).astype(out.dtype)
            return
        for chunk in range(acc.shape[2] // LANES):
            at = slice(chunk * LANES, (chunk + 1) * LANES)
            y = jnp.concatenate([acc[j, :, at] for j in range(CODES_PER_BYTE)], axis=1) * scale[0]
            # The small parts first; a sum of parts that each permutes exactly is exact.
            parts = [y] if out.dtype == jnp.bfloat16 else split_float32(y)[::-1]
            moved = [_dot(p.astype(jnp.bfloat16), rest[0][...], 0, jnp.float32) for p in parts]
            out[:, chunk * CHUNK : (chunk + 1) * CHUNK] = sum(moved[1:], moved[0]).astype(out.dtype)


def _unpack(packed: jax.Array, planes: int) -> list[jax.Array]:
    """uint8 [n, w] to planes: int32 [n / 4, w] with the code + 1 of four rows, in a byte each."""
    words = pltpu.bitcast(packed, jnp.int32)
    if planes == CODES_PER_BYTE:
        return [_shifted_right(words, 2 * j) & 0x03030303 for j in range(planes)]
    # Fractions of 256, two to a word: tripled, each carries its next digit into the byte above.
    even, odd = words & 0x00FF00FF, _shifted_right(words, 8) & 0x00FF00FF
    digits: list[jax.Array] = []
    for _ in range(planes):
        even, odd = even + even + even, odd + odd + odd
        digits.append((_shifted_right(even, 8) & 0x00030003) | (odd & 0x03000300))
        even, odd = even & 0x00FF00FF, odd & 0x00FF00FF
    return digits


def _shifted_right(words: jax.Array, bits: int) -> jax.Array:
    return lax.shift_right_logical(words, jnp.full_like(words, bits))


def _signed(plane: jax.Array) -> jax.Array:
    """Codes, bfloat16 [n, w], from words of codes + 1; no byte carries into the next."""
    shifted = (plane + 0x7F7F7F7F) ^ jnp.int32(-0x7F7F7F80)
    return pltpu.bitcast(shifted, jnp.int8).astype(jnp.bfloat16)


def _dot(x: jax.Array, y: jax.Array, axis: int, total: Any) -> jax.Array:
    """Contracts the last axis of ``x`` with ``axis`` of ``y``."""
    return lax.dot_general(x, y, (((1,), (axis,)), ((), ())), preferred_element_type=total)


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
