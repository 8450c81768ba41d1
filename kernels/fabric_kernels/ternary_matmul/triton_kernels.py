"""Pallas-Triton kernels of products with packed ternary weights. ``triton.py`` calls them.

A byte holds codes of P = 4 (``ternary2``) or 5 (``ternary1.6``) different k; the codes at the same
place in all bytes of a row are a *plane*. Activations come in planes too, [P, M, W], so that
unpacking moves nothing between lanes: a product is the sum of P products of planes.

Every kernel reads a stack [L, N, W] at a layer that it loads itself, so no layer is ever copied.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from fabric_kernels.packing import CODES_PER_BYTE, DIGITS_PER_BYTE, Packing
from fabric_kernels.triton_call import Mode

Ref = Any

# A field in the low bits of a float's mantissa is base + field; less base + 1 it is the code.
_HALVES = {
    "bfloat16": ("bf16x2", 0x43434343, 0x3F803F80, 0xC301C301),  # 128, 1, -129
    "float16": ("f16x2", 0x64646464, 0x3C003C00, 0xE401E401),  # 1024, 1, -1025
}


def _plane_asm(j: int, dtype: jnp.dtype) -> str:
    """Plane j of four bytes at once, as a 32-bit word; left alone Triton unpacks byte by byte."""
    field = f"{{ .reg .b32 f, a; shr.b32 f, $1, {2 * j}; and.b32 f, f, 0x03030303; "
    if dtype == jnp.int8:
        return field + "mov.b32 $0, f; }"
    name, base, one, less = _HALVES[dtype.name]
    field = field.replace("$1", "$2").replace("f, a;", "f, a, b, c;")
    field += f"mov.b32 b, {one}; mov.b32 c, {less}; "
    for half, select in enumerate((0x4140, 0x4342)):
        field += f"prmt.b32 a, f, {base}, {select}; fma.rn.{name} ${half}, a, b, c; "
    return field + "}"


def _planes(packed: jax.Array, dtype: jnp.dtype, packing: Packing, mode: Mode) -> list[jax.Array]:
    """The planes of a tile of bytes: codes + 1 as int8, or codes as floats."""
    integer = dtype == jnp.int8
    if mode == "cuda" and packing == "ternary2" and (integer or dtype.name in _HALVES):
        return [
            plgpu.elementwise_inline_asm(
                _plane_asm(j, dtype),
                args=[packed],
                constraints="=r,r" if integer else "=&r,=&r,r",
                pack=4,
                result_shape_dtypes=[jax.ShapeDtypeStruct(packed.shape, dtype)],
            )[0]
            for j in range(4)
        ]
    if packing == "ternary2":
        fields = [(packed >> (2 * j)) & 3 for j in range(CODES_PER_BYTE)]
    else:
        powers = [packed * jnp.uint8(3**j) for j in range(DIGITS_PER_BYTE)]
        fields = [(power.astype(jnp.int32) * 3) >> 8 for power in powers]
    if integer:
        return [field.astype(jnp.int8) for field in fields]
    return [(field.astype(jnp.float32) - 1.0).astype(dtype) for field in fields]


@dataclass(frozen=True)
class Tile:
    """Sizes of one program's work.

    Attributes:
        m: tokens.
        n: outputs.
        w: bytes of a row at a time.
        warps: of 32 threads (64 on AMD).
        stages: of the pipeline of loads.
    """

    m: int
    n: int
    w: int
    warps: int
    stages: int

    def params(self) -> plgpu.CompilerParams:
        """For ``pallas_call``."""
        return plgpu.CompilerParams(num_warps=self.warps, num_stages=self.stages)


def _load_packed(packed: Ref, layer: jax.Array, tile: Tile, row: jax.Array, column: jax.Array):
    """Bytes [tile.n, tile.w] of a layer; any value where the matrix has ended."""
    _, n, w = packed.shape
    at = packed.at[layer, pl.ds(row, tile.n), pl.ds(column, tile.w)]
    if n % tile.n == 0 and w % tile.w == 0:
        return plgpu.load(at)
    rows = row + lax.broadcasted_iota(jnp.int32, (tile.n, tile.w), 0)
    columns = column + lax.broadcasted_iota(jnp.int32, (tile.n, tile.w), 1)
    return plgpu.load(at, mask=(rows < n) & (columns < w), other=jnp.uint8(0))


def _store(out: Ref, value: jax.Array, row: jax.Array, column: jax.Array, limit: Any = None):
    """Writes what lies within [M, N]; columns from ``limit`` on are left alone."""
    m, n = out.shape
    at = out.at[pl.ds(row, value.shape[0]), pl.ds(column, value.shape[1])]
    if limit is None and m % value.shape[0] == 0 and n % value.shape[1] == 0:
        plgpu.store(at, value)
        return
    plgpu.store(at, value, mask=_inside(out, value.shape, row, column, limit))


def _inside(
    out: Ref, shape: tuple[int, ...], row: jax.Array, column: jax.Array, limit: Any = None
) -> jax.Array:
    rows = row + lax.broadcasted_iota(jnp.int32, shape, 0)
    columns = column + lax.broadcasted_iota(jnp.int32, shape, 1)
    mask = (rows < out.shape[0]) & (columns < out.shape[1])
    return mask if limit is None else mask & (columns < limit)


def _precision(dtype: jnp.dtype) -> lax.Precision | None:
    """Keeps float32 operands from being rounded to TF32."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def scale_at(scale: Ref, layer: jax.Array) -> jax.Array:
    """The one scale of a matrix: of its layer, or of all."""
    return scale[layer if scale.shape[0] > 1 else 0]


# ---- products over K ---------------------------------------------------------------------------


def product(
    planes: jax.Array,
    packed: jax.Array,
    layer: jax.Array,
    m: int,
    tile: Tile,
    *,
    packing: Packing,
    mode: Mode,
    quantized: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    dtype: Any,
) -> jax.Array:
    """``x · codes^T`` by tiles, on matrix units.

    Args:
        planes: int8 or float [P, M', W'], zeros past m and past the row; M' and W' whole tiles.
        packed: uint8 [L, N, W].
        layer: int32 [1].
        m: rows of the result.
        tile: sizes.
        packing: of the bytes.
        mode: what runs it.
        quantized: for int8, the sums of the codes of a token, int32 [M']; and for a scaled result
            what multiplies a token, float32 [M'], and the matrix, float32 [L] or [1].
        dtype: of the result.

    Returns:
        [m, N].
    """
    n = packed.shape[1]
    return pl.pallas_call(
        partial(_product_tile, tile=tile, packing=packing, mode=mode),
        out_shape=jax.ShapeDtypeStruct((m, n), dtype),
        grid=(pl.cdiv(n, tile.n), planes.shape[1] // tile.m),
        compiler_params=tile.params(),
        interpret=mode == "interpret",
        name="ternary_product",
    )(layer, packed, planes, *(quantized or ()))


def _product_tile(
    layer: Ref, packed: Ref, x: Ref, *rest: Ref, tile: Tile, packing: Packing, mode: Mode
) -> None:
    """One program of ``product``; the rest are what ``quantized`` holds, and the result."""
    *quantized, out = rest
    row, token = pl.program_id(0) * tile.n, pl.program_id(1) * tile.m
    tokens = pl.ds(token, tile.m)
    index = layer[0]
    accumulate = jnp.int32 if x.dtype == jnp.int8 else jnp.float32

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        at = i * tile.w
        v = _load_packed(packed, index, tile, row, at)
        for j, codes in enumerate(_planes(v, x.dtype, packing, mode)):
            # The weights are the left operand: it may stay in registers, where it is unpacked.
            total = total + _contract_last(codes, x[j, tokens, pl.ds(at, tile.w)], accumulate)
        return total

    zero = jnp.zeros((tile.n, tile.m), accumulate)
    total = lax.fori_loop(0, x.shape[2] // tile.w, step, zero)
    if quantized:
        total = total - quantized[0][tokens][None, :]
    if len(quantized) > 1:
        factor = quantized[1][tokens] * scale_at(quantized[2], index)
        total = total.astype(jnp.float32) * factor[None, :]
    _store(out, total.astype(out.dtype).T, token, row)


def _contract_last(a: jax.Array, b: jax.Array, accumulate: Any) -> jax.Array:
    return lax.dot_general(
        a,
        b,
        (((1,), (1,)), ((), ())),
        precision=_precision(a.dtype),
        preferred_element_type=accumulate,
    )


# ---- products over N ---------------------------------------------------------------------------


def transposed(
    g: jax.Array,
    packed: jax.Array,
    layer: jax.Array,
    shape: tuple[int, int],
    tile: Tile,
    *,
    packing: Packing,
    mode: Mode,
    scale: jax.Array | None,
    before: jax.Array | None,
    dtype: Any,
) -> jax.Array:
    """``before + scale · (g · codes)`` by tiles, on matrix units.

    Args:
        g: float [M', N'], zeros past the matrix; whole tiles.
        packed: uint8 [L, N, W].
        layer: int32 [1].
        shape: (m, k) of the result.
        tile: sizes.
        packing: of the bytes.
        mode: what runs it.
        scale: float32 [L] or [1], or None for 1.
        before: float32 [m, k], or None for 0.
        dtype: of the result.

    Returns:
        [m, k].
    """
    kernel = partial(
        _transposed_tile, tile=tile, packing=packing, mode=mode, scaled=scale is not None
    )
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
        grid=(pl.cdiv(packed.shape[2], tile.w), g.shape[0] // tile.m),
        compiler_params=tile.params(),
        interpret=mode == "interpret",
        name="ternary_transposed",
    )(layer, packed, g, *[extra for extra in (scale, before) if extra is not None])


def _transposed_tile(
    layer: Ref,
    packed: Ref,
    g: Ref,
    *rest: Ref,
    tile: Tile,
    packing: Packing,
    mode: Mode,
    scaled: bool,
) -> None:
    """One program of ``transposed``; the rest are scale, what was before, and the result."""
    extra, out = list(rest[:-1]), rest[-1]
    column, token = pl.program_id(0) * tile.w, pl.program_id(1) * tile.m
    index = layer[0]

    def step(i: jax.Array, totals: list[jax.Array]) -> list[jax.Array]:
        at = i * tile.n
        part = g[pl.ds(token, tile.m), pl.ds(at, tile.n)]
        v = _load_packed(packed, index, tile, at, column)
        planes = _planes(v, g.dtype, packing, mode)
        return [
            total + _contract_rows(part, codes) for total, codes in zip(totals, planes, strict=True)
        ]

    count = CODES_PER_BYTE if packing == "ternary2" else DIGITS_PER_BYTE
    zero = [jnp.zeros((tile.m, tile.w), jnp.float32)] * count
    totals = lax.fori_loop(0, g.shape[1] // tile.n, step, zero)
    factor = scale_at(extra.pop(0), index) if scaled else None
    for value, at, limit in _columns(totals, column, packed.shape[2], packing):
        y = value if factor is None else value * factor
        if extra:
            where = extra[0].at[pl.ds(token, y.shape[0]), pl.ds(at, y.shape[1])]
            mask = _inside(out, y.shape, token, at, limit)
            y = y + plgpu.load(where, mask=mask, other=jnp.float32(0))
        _store(out, y.astype(out.dtype), token, at, limit)


def _contract_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    return lax.dot_general(
        a,
        b,
        (((1,), (0,)), ((), ())),
        precision=_precision(a.dtype),
        preferred_element_type=jnp.float32,
    )


def _columns(
    totals: Sequence[jax.Array], column: jax.Array, width: int, packing: Packing
) -> list[tuple[jax.Array, jax.Array, Any]]:
    """Blocks of the result: values, first column, and the column they end before (None: K)."""
    if packing == "ternary2":
        a, b, c, d = totals
        pairs = jnp.stack([jnp.stack([a, c], -1), jnp.stack([b, d], -1)], -1)
        return [(pairs.reshape(a.shape[0], -1), column * 4, None)]
    return [(total, column + j * width, (j + 1) * width) for j, total in enumerate(totals)]
