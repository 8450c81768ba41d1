"""Pallas-Triton kernels of products with packed ternary weights. ``triton.py`` calls them.

A byte holds codes of P = 4 (``ternary2``) or 5 (``ternary1.6``) different k; the codes at the same
place in all bytes of a row are a *plane*. Activations come in planes too, [P, M, W], so that
unpacking moves nothing between lanes: a product is the sum of P products of planes.

Every kernel reads a stack [L, N, W] at a layer that it loads itself, so no layer is ever copied.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from fabric_kernels.packing import CODES_PER_BYTE, DIGITS_PER_BYTE, Packing
from fabric_kernels.triton_call import Mode
from fabric_kernels.triton_programs import program_id

Ref = Any


@partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["start", "count"])
@dataclass(frozen=True)
class Columns:
    """Columns of an array: the narrow products of all adapters of a group are one.

    Attributes:
        values: floats [M, S]; zeros from a rank to the next that matrix units take.
        start: the first column.
        count: of them, the rank of an adapter.
    """

    values: Any
    start: int = field(metadata={"static": True})
    count: int = field(metadata={"static": True})

    def load(self, row: Any, rows: int, within: int = 0) -> jax.Array:
        """So many rows of them, zeros up to a rank that matrix units take.

        ``within`` is what rows of blocks stay within, where that may be more than M.
        """
        m, rank = self.values.shape[0], padded_rank(self.count)
        at = self.values.at[pl.ds(row, rows), pl.ds(jnp.int32(self.start), rank)]
        if m % rows == 0 and within <= m:
            return plgpu.load(at)
        mask = inside(self.values, (rows, rank), row, self.start)
        return plgpu.load(at, mask=mask, other=jnp.zeros((), self.values.dtype))

    def store(self, value: jax.Array, row: Any) -> None:
        """Rows of them, with the zeros that follow."""
        m = self.values.shape[0]
        value = value.astype(self.values.dtype)
        at = self.values.at[
            pl.ds(row, value.shape[0]), pl.ds(jnp.int32(self.start), value.shape[1])
        ]
        mask = None
        if m % value.shape[0]:
            mask = inside(self.values, value.shape, row, self.start)
        plgpu.store(at, value, mask=mask)


Share = tuple[Columns, jax.Array]
"""A low-rank product: floats [M, R], and [R, C] of any float dtype."""

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


def codes_of_planes(
    packed: jax.Array, dtype: jnp.dtype, packing: Packing, mode: Mode
) -> list[jax.Array]:
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


def run_parts(parts: Sequence[tuple[int, Callable[[jax.Array], None]]], mode: Mode) -> None:
    """One program of a launch that does several things: so many programs for each, in turn.

    A launch takes about two microseconds whatever it does, which is what short kernels cost.
    """
    program = program_id(mode)
    start = 0
    for count, body in parts:
        own = program - start if start else program
        if len(parts) == 1:
            body(own)
        else:
            pl.when((program >= start) & (program < start + count))(partial(body, own))
        start += count


def load_packed(
    packed: Ref,
    layer: jax.Array,
    tile: Tile,
    row: jax.Array,
    column: jax.Array,
    *,
    rows: int | None = None,
) -> jax.Array:
    """Bytes [tile.n, tile.w] of a layer; any value where the matrix has ended.

    ``rows`` is a number that ``row`` + tile.n stays within, where that isn't N.
    """
    _, n, w = packed.shape
    at = packed.at[layer, pl.ds(row, tile.n), pl.ds(column, tile.w)]
    if n % tile.n == 0 and (rows or n) <= n and w % tile.w == 0:
        return plgpu.load(at)
    row_ids = row + lax.broadcasted_iota(jnp.int32, (tile.n, tile.w), 0)
    columns = column + lax.broadcasted_iota(jnp.int32, (tile.n, tile.w), 1)
    return plgpu.load(at, mask=(row_ids < n) & (columns < w), other=jnp.uint8(0))


def load(
    ref: Ref,
    start: tuple[Any, Any],
    shape: tuple[int, int],
    within: tuple[int, int] | None = None,
    *,
    lead: tuple[Any, ...] = (),
) -> jax.Array:
    """A block of a matrix, zeros where it has ended.

    Args:
        ref: [..., R, C].
        start: first row and column, multiples of the shape's.
        shape: of the block.
        within: what rows and columns of blocks stay within, where that is more than the next
            multiples of the shape's.
        lead: which matrix of a stack.
    """
    lead = tuple(jnp.int32(i) for i in lead)
    at = ref.at[*lead, pl.ds(start[0], shape[0]), pl.ds(start[1], shape[1])]
    sizes = ref.shape[-2:]
    fits = all(size % part == 0 for size, part in zip(sizes, shape, strict=True))
    if fits and all(w <= size for w, size in zip(within or (0, 0), sizes, strict=True)):
        return plgpu.load(at)
    return plgpu.load(at, mask=inside(ref, shape, *start), other=jnp.zeros((), ref.dtype))


def store(
    out: Ref,
    value: jax.Array,
    row: Any,
    column: Any,
    limit: Any = None,
    *,
    lead: tuple[Any, ...] = (),
) -> None:
    """Writes what lies within a matrix of [..., M, N]; columns from ``limit`` on are left alone."""
    m, n = out.shape[-2:]
    lead = tuple(jnp.int32(i) for i in lead)
    at = out.at[*lead, pl.ds(row, value.shape[0]), pl.ds(column, value.shape[1])]
    if limit is None and m % value.shape[0] == 0 and n % value.shape[1] == 0:
        plgpu.store(at, value)
        return
    plgpu.store(at, value, mask=inside(out, value.shape, row, column, limit))


def inside(out: Ref, shape: tuple[int, ...], row: Any, column: Any, limit: Any = None) -> jax.Array:
    """Which elements of a block lie within a matrix of [..., M, N], in columns before ``limit``."""
    rows = row + lax.broadcasted_iota(jnp.int32, shape, 0)
    columns = column + lax.broadcasted_iota(jnp.int32, shape, 1)
    mask = (rows < out.shape[-2]) & (columns < out.shape[-1])
    return mask if limit is None else mask & (columns < limit)


def precision_of(dtype: jnp.dtype) -> lax.Precision | None:
    """Keeps float32 operands from being rounded to TF32."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def scale_at(scale: Ref, layer: jax.Array) -> jax.Array:
    """The one scale of a matrix: of its layer, or of all."""
    return scale[layer if scale.shape[0] > 1 else 0]


# ---- products over K ---------------------------------------------------------------------------


def products(
    planes: jax.Array,
    packed: Sequence[jax.Array],
    layers: Sequence[jax.Array],
    m: int,
    tile: Tile,
    *,
    packing: Packing,
    mode: Mode,
    sums: jax.Array | None = None,
    factors: Sequence[jax.Array] | None = None,
    shares: Sequence[Share | None] | None = None,
    dtype: Any,
) -> tuple[jax.Array, ...]:
    """``x · codes^T`` for matrices of the same width in one launch, by tiles, on matrix units.

    Args:
        planes: int8 or float [P, M', W'], zeros past the row; M' and W' whole tiles. Rows past m
            may be anything.
        packed: uint8 [L, N, W] each.
        layers: int32 [1] each.
        m: rows of the result.
        tile: sizes.
        packing: of the bytes.
        mode: what runs it.
        sums: for int8, of the codes of a token, int32 [M'].
        factors: what multiplies each token of each product, float32 [M'].
        shares: low-rank products [m, N] to be added.
        dtype: of the results.

    Returns:
        [m, N] each.
    """
    none = (None,) * len(packed)
    groups = list(zip(layers, packed, factors or none, shares or none, strict=True))
    down = planes.shape[1] // tile.m

    def kernel(x: Ref, sums: Ref, groups: Any, *outputs: Ref) -> None:
        run_parts(
            [
                (
                    pl.cdiv(out.shape[1], tile.n) * down,
                    partial(_product, x, sums, *group, out, tile, packing, mode),
                )
                for group, out in zip(groups, outputs, strict=True)
            ],
            mode,
        )

    return tuple(
        pl.pallas_call(
            kernel,
            out_shape=[jax.ShapeDtypeStruct((m, p.shape[1]), dtype) for p in packed],
            grid=(sum(pl.cdiv(p.shape[1], tile.n) for p in packed) * down,),
            compiler_params=tile.params(),
            interpret=mode == "interpret",
            name="ternary_product",
        )(planes, sums, groups)
    )


def _product(
    x: Ref,
    sums: Ref | None,
    layer: Ref,
    packed: Ref,
    factor: Ref | None,
    share: tuple[Columns, Ref] | None,
    out: Ref,
    tile: Tile,
    packing: Packing,
    mode: Mode,
    program: jax.Array,
) -> None:
    """A tile of one matrix's product; those of the same tokens follow one another."""
    across = pl.cdiv(out.shape[1], tile.n)
    row, token = lax.rem(program, across) * tile.n, lax.div(program, across) * tile.m
    tokens = pl.ds(token, tile.m)
    index = layer[0]
    accumulate = jnp.int32 if x.dtype == jnp.int8 else jnp.float32

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        at = i * tile.w
        v = load_packed(packed, index, tile, row, at)
        for j, codes in enumerate(codes_of_planes(v, x.dtype, packing, mode)):
            # The weights are the left operand: it may stay in registers, where it is unpacked.
            total = total + contract(codes, x[j, tokens, pl.ds(at, tile.w)], (1, 1), accumulate)
        return total

    zero = jnp.zeros((tile.n, tile.m), accumulate)
    total = lax.fori_loop(0, x.shape[2] // tile.w, step, zero)
    if sums is not None:
        total = total - sums[tokens][None, :]
    if factor is not None:
        total = total.astype(jnp.float32) * factor[tokens][None, :]
    if share is not None:
        narrow = share[0].load(token, tile.m)
        wide = load(share[1], (0, row), (narrow.shape[1], tile.n)).astype(narrow.dtype)
        total = total + contract(wide, narrow, (0, 1))
    store(out, total.astype(out.dtype).T, token, row)


def padded_rank(rank: int) -> int:
    """What a matrix unit takes: a power of two, at least 16."""
    return max(16, 1 << (rank - 1).bit_length())


def contract(
    a: jax.Array, b: jax.Array, axes: tuple[int, int], accumulate: Any = jnp.float32
) -> jax.Array:
    """The product over an axis of each."""
    return lax.dot_general(
        a,
        b,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=precision_of(a.dtype),
        preferred_element_type=accumulate,
    )


# ---- products over N ---------------------------------------------------------------------------


def transposed(
    g: jax.Array,
    packed: jax.Array,
    layer: jax.Array,
    k: int,
    tile: Tile,
    *,
    packing: Packing,
    mode: Mode,
    scale: jax.Array | None,
    before: jax.Array | None,
    share: Share | None = None,
    dtype: Any,
) -> jax.Array:
    """``before + scale · (g · codes) + share`` by tiles, on matrix units.

    Args:
        g: float [M, N].
        packed: uint8 [L, N, W].
        layer: int32 [1].
        k: columns of the result.
        tile: sizes.
        packing: of the bytes.
        mode: what runs it.
        scale: float32 [L] or [1], or None for 1.
        before: float32 [M, k], or None for 0.
        share: a low-rank product [M, k].
        dtype: of the result.

    Returns:
        [M, k].
    """
    m = g.shape[0]

    def kernel(
        layer: Ref,
        packed: Ref,
        g: Ref,
        scale: Ref | None,
        before: Ref | None,
        share: tuple[Columns, Ref] | None,
        out: Ref,
    ) -> None:
        column, token = program_id(mode) * tile.w, pl.program_id(1) * tile.m
        index = layer[0]
        steps = pl.cdiv(packed.shape[1], tile.n)
        totals = sum_rows(g, packed, index, (token, column), (0, steps), tile, packing, mode)
        factor = None if scale is None else scale_at(scale, index)
        for value, at, limit in columns_of(totals, column, packed.shape[2], packing):
            y = value if factor is None else value * factor
            mask = inside(out, y.shape, token, at, limit)
            if before is not None:
                where = before.at[pl.ds(token, y.shape[0]), pl.ds(at, y.shape[1])]
                y = y + plgpu.load(where, mask=mask, other=jnp.float32(0))
            if share is not None:
                y = y + share_at(share, (token, at), (tile.m, y.shape[1]))
            store(out, y.astype(out.dtype), token, at, limit)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((m, k), dtype),
        grid=(pl.cdiv(packed.shape[2], tile.w), pl.cdiv(m, tile.m)),
        compiler_params=tile.params(),
        interpret=mode == "interpret",
        name="ternary_transposed",
    )(layer, packed, g, scale, before, share)


def share_at(
    share: tuple[Columns, Ref], start: tuple[Any, Any], shape: tuple[int, int]
) -> jax.Array:
    """A block of a low-rank product in float32; any value past its columns."""
    narrow, b = share[0].load(start[0], shape[0]), share[1]
    rank = narrow.shape[1]
    where = b.at[pl.ds(0, rank), pl.ds(start[1], shape[1])]
    wide = plgpu.load(
        where, mask=inside(b, (rank, shape[1]), 0, start[1]), other=jnp.zeros((), b.dtype)
    )
    return contract(narrow, wide.astype(narrow.dtype), (1, 0))


def sum_rows(
    g: Ref,
    packed: Ref,
    layer: jax.Array,
    start: tuple[Any, Any],
    steps: tuple[Any, int],
    tile: Tile,
    packing: Packing,
    mode: Mode,
) -> list[jax.Array]:
    """``g · codes`` over rows of a matrix: float32 [tile.m, tile.w] for each plane.

    ``start``: first token and byte; ``steps``: the first step of tile.n rows, and how many.
    """
    token, column = start
    first, count = steps
    # All parts of a matrix have as many steps: the last one's may lie past the end.
    rows = pl.cdiv(pl.cdiv(g.shape[1], tile.n), count) * count * tile.n

    def step(i: jax.Array, totals: list[jax.Array]) -> list[jax.Array]:
        at = (first + i) * tile.n
        within = (pl.cdiv(g.shape[0], tile.m) * tile.m, rows)
        part = load(g, (token, at), (tile.m, tile.n), within)
        v = load_packed(packed, layer, tile, at, column, rows=rows)
        planes = codes_of_planes(v, g.dtype, packing, mode)
        return [
            total + contract(part, codes, (1, 0))
            for total, codes in zip(totals, planes, strict=True)
        ]

    planes = CODES_PER_BYTE if packing == "ternary2" else DIGITS_PER_BYTE
    return lax.fori_loop(0, count, step, [jnp.zeros((tile.m, tile.w), jnp.float32)] * planes)


def columns_of(
    totals: Sequence[jax.Array], column: jax.Array, width: int, packing: Packing
) -> list[tuple[jax.Array, jax.Array, Any]]:
    """Blocks of the result: values, first column, and the column they end before (None: K)."""
    if packing == "ternary2":
        a, b, c, d = totals
        pairs = jnp.stack([jnp.stack([a, c], -1), jnp.stack([b, d], -1)], -1)
        return [(pairs.reshape(a.shape[0], -1), column * 4, None)]
    return [(total, column + j * width, (j + 1) * width) for j, total in enumerate(totals)]
