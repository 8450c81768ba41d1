"""Pallas-Triton kernels of the backward pass of a group of linears with adapters: two launches.

The first one multiplies gradients by codes, in parts of N so that few tokens make programs enough,
and by B^T; the second one adds the parts and the adapters' shares up, and makes the gradients of A
and B. Each does several things at once that don't wait for one another.
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

from fabric_kernels.low_rank import LowRank
from fabric_kernels.packing import Packing
from fabric_kernels.ternary_matmul.triton_kernels import (
    Columns,
    Ref,
    Share,
    Tile,
    columns_of,
    contract,
    load,
    padded_rank,
    run_parts,
    scale_at,
    share_at,
    store,
    sum_rows,
)
from fabric_kernels.ternary_matmul.triton_quantize import NarrowTile, narrow_product, side_by_side
from fabric_kernels.triton_call import Mode


@dataclass(frozen=True)
class Parts:
    """How a group's products over N are cut up.

    Attributes:
        tile: of a program.
        steps: of tile.n rows, in each part.
    """

    tile: Tile
    steps: int

    def of(self, n: int) -> int:
        """Parts of a matrix of n rows."""
        return pl.cdiv(pl.cdiv(n, self.tile.n), self.steps)


@dataclass(frozen=True)
class SumTile:
    """One program's work in the second launch.

    Attributes:
        m: tokens of a sum.
        columns: of a sum, and of a gradient of A or B.
        tokens: of such a gradient, at a time.
        most: tokens of such a gradient in one program; parts are left to be added up.
        warps: of 32 threads.
        stages: of the pipeline of loads.
    """

    m: int = 16
    columns: int = 64
    tokens: int = 64
    most: int = 1024
    warps: int = 4
    stages: int = 2


Matrix = tuple[jax.Array, jax.Array, jax.Array]
"""Bytes [L, N, W], scale [L] or [1], layer [1]."""


def over_outputs(
    gradients: Sequence[jax.Array],
    matrices: Sequence[Matrix],
    adapters: Sequence[LowRank | None],
    k: int,
    parts: Parts | None,
    tile: NarrowTile,
    *,
    packing: Packing,
    mode: Mode,
) -> tuple[jax.Array | None, jax.Array]:
    """Products with codes and with adapters' B^T, which run over a matrix's outputs.

    Args:
        gradients: floats [M, N] each.
        matrices: of each.
        adapters: of each, or None.
        k: K.
        parts: of the products with codes; None for no such products.
        tile: of the products with B^T.
        packing: of the bytes.
        mode: what runs it.

    Returns:
        Parts of ``sum scale · (g · codes)``, float32 [P, M, k]; and ``scale · g · B^T`` of the
        adapters side by side, [M, sum of padded ranks] in g's dtype.
    """
    m, dtype = gradients[0].shape[0], gradients[0].dtype
    present = [one for one in adapters if one is not None]
    ranks = [one.b.shape[0] for one in present]
    shapes: list[Any] = []
    counts = [pl.cdiv(m, tile.m)] * len(present)
    params = plgpu.CompilerParams(num_warps=4, num_stages=tile.stages)
    if parts:
        lengths = [parts.of(g.shape[1]) for g in gradients]
        shapes.append(jax.ShapeDtypeStruct((sum(lengths), m, k), jnp.float32))
        counts += [n * _tiles(m, matrices[0][0].shape[2], parts.tile) for n in lengths]
        params = parts.tile.params()
    if present:
        shapes.append(jax.ShapeDtypeStruct((m, sum(map(padded_rank, ranks))), dtype))

    def kernel(gradients: Any, matrices: Any, b: Any, *outputs: Ref) -> None:
        members = [g for g, one in zip(gradients, adapters, strict=True) if one is not None]
        narrow = side_by_side(outputs[-1], ranks)
        work: list[Any] = []
        for g, out, b_ref, adapter in zip(members, narrow, b, present, strict=True):
            work.append(partial(narrow_product, g, b_ref, out, adapter.scale, tile))
        if parts:
            work += _parts(gradients, matrices, outputs[0], parts, packing, mode)
        run_parts(list(zip(counts, work, strict=True)), mode)

    outputs = pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid=(sum(counts),),
        compiler_params=params,
        interpret=mode == "interpret",
        name="ternary_over_outputs",
    )(list(gradients), list(matrices) if parts else [], [one.b for one in present])
    narrow = outputs[-1] if present else jnp.zeros((m, 0), dtype)
    return outputs[0] if parts else None, narrow


def _parts(
    gradients: Sequence[Ref],
    matrices: Sequence[tuple[Ref, Ref, Ref]],
    out: Ref,
    parts: Parts,
    packing: Packing,
    mode: Mode,
) -> list[Any]:
    """What a program does, for each matrix."""
    lengths = [parts.of(g.shape[1]) for g in gradients]
    firsts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [
        partial(_part, g, matrix, out, first, count, parts, packing, mode)
        for g, matrix, first, count in zip(gradients, matrices, firsts, lengths, strict=True)
    ]


def _tiles(m: int, width: int, tile: Tile) -> int:
    return pl.cdiv(m, tile.m) * pl.cdiv(width, tile.w)


def _part(
    g: Ref,
    matrix: tuple[Ref, Ref, Ref],
    out: Ref,
    first: int,
    count: int,
    parts: Parts,
    packing: Packing,
    mode: Mode,
    program: jax.Array,
) -> None:
    """``scale · (g · codes)`` of one part of N, at one tile of tokens and bytes."""
    packed, scale, layer = matrix
    tile = parts.tile
    index = layer[0]
    across = pl.cdiv(packed.shape[2], tile.w)
    part, rest = lax.rem(program, count), lax.div(program, count)
    token, column = lax.div(rest, across) * tile.m, lax.rem(rest, across) * tile.w
    steps = (part * parts.steps, parts.steps)
    totals = sum_rows(g, packed, index, (token, column), steps, tile, packing, mode)
    factor = scale_at(scale, index)
    for value, at, limit in columns_of(totals, column, packed.shape[2], packing):
        store(out, value * factor, token, at, limit, lead=(first + part,))


Factor = tuple[jax.Array, jax.Array]
"""Scale float32 [L] or [1], and layer int32 [1]."""
Sum = tuple[Sequence[tuple[jax.Array, Factor | None]], Sequence[Share]]
"""Floats [P, M, C] with what multiplies them, and low-rank products [M, C]: all is added up."""
Pair = tuple[Sequence[Columns], jax.Array]
"""Narrow floats [M, R] each, and [M, C] that they all are multiplied with."""


def add_up(
    sums: Sequence[Sum],
    pairs: Sequence[Pair],
    tile: SumTile,
    *,
    dtype: Any,
    mode: Mode,
) -> tuple[list[jax.Array], list[list[jax.Array]]]:
    """Sums of parts and low-rank products, and narrow products over tokens.

    Args:
        sums: what is added up in float32; written over the first term where that has one part and
            is of ``dtype``.
        pairs: what is multiplied.
        tile: sizes.
        dtype: of the sums.
        mode: what runs it.

    Returns:
        The sums [M, C], and ``narrow^T · wide`` float32 [R, C] for each narrow of each pair.
    """
    count = pl.cdiv(pairs[0][1].shape[0], tile.most) if pairs else 1
    firsts = [terms[0][0] for terms, _ in sums]
    shapes = [jax.ShapeDtypeStruct((1, *parts.shape[1:]), dtype) for parts in firsts]
    in_place = {i: i for i, parts in enumerate(firsts) if len(parts) == 1 and parts.dtype == dtype}
    for narrow, wide in pairs:
        for u in narrow:
            shapes.append(jax.ShapeDtypeStruct((count, u.count, wide.shape[1]), jnp.float32))

    programs = [_sum_programs(parts, tile) for parts in firsts]
    programs += [count * pl.cdiv(wide.shape[1], tile.columns) for _, wide in pairs]

    def kernel(firsts: Any, sums: Any, pairs: Any, *outputs: Ref) -> None:
        left = list(outputs)
        work: list[Any] = []
        for first, (factor, more, shares) in zip(firsts, sums, strict=True):
            work.append(partial(_sum, [(first, factor), *more], shares, left.pop(0), tile))
        for narrow, wide in pairs:
            own, left = left[: len(narrow)], left[len(narrow) :]
            work.append(partial(_over_tokens, narrow, wide, own, tile))
        run_parts(list(zip(programs, work, strict=True)), mode)

    outputs = pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid=(sum(programs),),
        input_output_aliases=in_place,
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=mode == "interpret",
        name="ternary_add_up",
    )(
        firsts,
        [(terms[0][1], list(terms[1:]), list(shares)) for terms, shares in sums],
        [(list(narrow), wide) for narrow, wide in pairs],
    )
    totals = [y[0] for y in outputs[: len(sums)]]
    left = [u[0] if count == 1 else jnp.sum(u, axis=0) for u in outputs[len(sums) :]]
    products: list[list[jax.Array]] = []
    for narrow, _ in pairs:
        products.append(left[: len(narrow)])
        left = left[len(narrow) :]
    return totals, products


def _sum_programs(parts: Any, tile: SumTile) -> int:
    return pl.cdiv(parts.shape[1], tile.m) * pl.cdiv(parts.shape[2], tile.columns)


def _sum(
    terms: Sequence[tuple[Ref, tuple[Ref, Ref] | None]],
    shares: Sequence[tuple[Columns, Ref]],
    out: Ref,
    tile: SumTile,
    program: jax.Array,
) -> None:
    across = pl.cdiv(out.shape[2], tile.columns)
    row, column = lax.div(program, across) * tile.m, lax.rem(program, across) * tile.columns
    shape = (tile.m, tile.columns)
    # Shares come first: added to a sum they have Triton bring every part of it into the layout of a
    # matrix unit by itself, with barriers between one load and the next.
    y = jnp.zeros(shape, jnp.float32)
    for share in shares:
        y = y + share_at(share, (row, column), shape)
    for parts, factor in terms:
        part = load(parts, (row, column), shape, lead=(0,)).astype(jnp.float32)
        for i in range(1, parts.shape[0]):
            part = part + load(parts, (row, column), shape, lead=(i,)).astype(jnp.float32)
        y = (part if factor is None else part * scale_at(factor[0], factor[1][0])) + y
    store(out, y.astype(out.dtype), row, column, lead=(0,))


def _over_tokens(
    narrow: Sequence[Columns], wide: Ref, outputs: Sequence[Ref], tile: SumTile, program: jax.Array
) -> None:
    """Columns of ``narrow^T · wide`` over one part of the tokens."""
    count = outputs[0].shape[0]
    part, column = lax.rem(program, count), lax.div(program, count) * tile.columns
    ranks = [padded_rank(u.count) for u in narrow]
    steps = pl.cdiv(min(tile.most, wide.shape[0]), tile.tokens)
    rows = count * steps * tile.tokens

    def step(i: jax.Array, totals: list[jax.Array]) -> list[jax.Array]:
        at = (part * steps + i) * tile.tokens
        block = load(wide, (at, column), (tile.tokens, tile.columns), (rows, 0))
        return [
            total + contract(u.load(at, tile.tokens, rows), block, (0, 0))
            for total, u in zip(totals, narrow, strict=True)
        ]

    zero = [jnp.zeros((rank, tile.columns), jnp.float32) for rank in ranks]
    totals = lax.fori_loop(0, steps, step, zero)
    for total, out in zip(totals, outputs, strict=True):
        store(out, total, 0, column, lead=(part,))
