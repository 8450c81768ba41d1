"""A Pallas-Triton kernel for few tokens, where reading the weights is what takes time.

No matrix units: four bytes of weights and of each plane of activations are words for ``dp4a``.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from fabric_kernels.absmax import EPSILON
from fabric_kernels.ternary_matmul.triton_kernels import Ref, Tile, scale_at
from fabric_kernels.triton_call import Mode

MAX_UNROLLED = 8
"""Vectors of a row whose loads are all in one straight run of code."""

# Four fields times four activations each, added to a sum. Of the four sums of a group of four
# elements only the first is in use: the others stay 0, which the compiler finds out.
_DOT = (
    "{ .reg .b32 f, s; and.b32 f, $4, 0x03030303; dp4a.s32.s32 s, f, $5, $9;"
    + "".join(
        f" shr.b32 f, $4, {2 * j}; and.b32 f, f, 0x03030303; dp4a.s32.s32 s, f, ${5 + j}, s;"
        for j in (1, 2, 3)
    )
    + " mov.b32 $0, s; mov.b32 $1, $10; mov.b32 $2, $11; mov.b32 $3, $12; }"
)


def few_tokens(
    planes: jax.Array,
    packed: Sequence[jax.Array],
    layers: Sequence[jax.Array],
    m: int,
    tile: Tile,
    *,
    mode: Mode,
    sums: jax.Array,
    factors: tuple[jax.Array, Sequence[jax.Array]] | None,
    dtype: Any,
) -> tuple[jax.Array, ...]:
    """``x · codes^T`` of int8 tokens and several ``ternary2`` matrices in one launch.

    A program takes tile.n rows of a matrix, each as vectors along k: what the elements of a vector
    are, and which of them form a word for ``dp4a``, makes no difference to a sum over all of them.

    Args:
        planes: int8 [4, M', W'], zeros past the row; W' whole tiles.
        packed: uint8 [L, N, W] each, with the same W.
        layers: int32 [1] each.
        m: tokens, at most M'.
        tile: sizes.
        mode: what runs it.
        sums: int32 [M'], of the codes of a token.
        factors: what multiplies a token, float32 [M'], and each matrix, float32 [L] or [1].
        dtype: of the results.

    Returns:
        [m, N] each.
    """
    programs = [pl.cdiv(p.shape[1], tile.n) for p in packed]
    scaled = (factors[0], *factors[1]) if factors else ()
    return tuple(
        pl.pallas_call(
            partial(_rows_of_group, programs=programs, m=m, tile=tile, mode=mode),
            out_shape=[jax.ShapeDtypeStruct((m, p.shape[1]), dtype) for p in packed],
            grid=(sum(programs),),
            compiler_params=tile.params(),
            interpret=mode == "interpret",
            name="ternary_few_tokens",
        )(planes, sums, *layers, *packed, *scaled)
    )


def _rows_of_group(
    x: Ref, sums: Ref, *rest: Ref, programs: list[int], m: int, tile: Tile, mode: Mode
) -> None:
    """One program of ``few_tokens``: finds its matrix, which comes after those before it."""
    count = len(programs)
    refs, outputs = rest[:-count], rest[-count:]
    factors = refs[2 * count :]
    program = pl.program_id(0)
    start = 0
    for g, (length, out) in enumerate(zip(programs, outputs, strict=True)):
        run = partial(
            _rows,
            x,
            sums,
            refs[g],
            refs[count + g],
            (factors[0], factors[1 + g]) if factors else None,
            out,
            (program - start) * tile.n,
            m=m,
            tile=tile,
            mode=mode,
        )
        if count == 1:
            run()
        else:
            pl.when((program >= start) & (program < start + length))(run)
        start += length


def _rows(
    x: Ref,
    sums: Ref,
    layer: Ref,
    packed: Ref,
    factors: tuple[Ref, Ref] | None,
    out: Ref,
    row: jax.Array,
    *,
    m: int,
    tile: Tile,
    mode: Mode,
) -> None:
    """All tokens by tile.n rows of a matrix."""
    index = layer[0]
    # Rows past the end are the last one over again.
    rows = [jnp.minimum(row + r, out.shape[1] - 1) for r in range(tile.n)]
    totals = _row_sums(x, packed, index, rows, m, tile, mode)
    for t in range(m):
        for r in range(tile.n):
            y = jnp.sum(totals[r][t]) - sums[t]
            if factors is not None:
                y = y.astype(jnp.float32) * (factors[0][t] * scale_at(factors[1], index))
            out[t, rows[r]] = y.astype(out.dtype)


def _row_sums(
    x: Ref, packed: Ref, layer: jax.Array, rows: list[jax.Array], m: int, tile: Tile, mode: Mode
) -> list[list[jax.Array]]:
    """Partial sums [tile.w] for each row and token, to be added up."""
    width = packed.shape[2]

    def step(i: Any, totals: list[list[jax.Array]]) -> list[list[jax.Array]]:
        at = i * tile.w
        columns = at + lax.iota(jnp.int32, tile.w)
        inside = columns < width if width % tile.w else None
        bytes_ = [plgpu.load(packed.at[layer, row, columns], mask=inside) for row in rows]
        totals = [list(row) for row in totals]
        for t in range(m):
            fields = [x[j, t, pl.ds(at, tile.w)] for j in range(4)]
            for r, v in enumerate(bytes_):
                totals[r][t] = _dot(v, fields, totals[r][t], mode)
        return totals

    totals = [[jnp.zeros((tile.w,), jnp.int32)] * m for _ in rows]
    steps = pl.cdiv(width, tile.w)
    if steps > MAX_UNROLLED:
        return lax.fori_loop(0, steps, step, totals)
    for i in range(steps):
        totals = step(i, totals)
    return totals


def _dot(v: jax.Array, x: list[jax.Array], total: jax.Array, mode: Mode) -> jax.Array:
    """The total with the products of four fields and their activations added somewhere."""
    if mode != "cuda":
        for j in range(4):
            field = ((v >> (2 * j)) & 3).astype(jnp.int32)
            total = total + field * x[j].astype(jnp.int32)
        return total
    (total,) = plgpu.elementwise_inline_asm(
        _DOT,
        args=[v, *x, total],
        constraints=",".join(["=&r"] * 4 + ["r"] * 9),
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(v.shape, jnp.int32)],
    )
    return total


def quantize(x: jax.Array, width: int, *, mode: Mode) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``absmax_quantize`` of few tokens with all that ``few_tokens`` needs, in one launch.

    Args:
        x: floats [M, K].
        width: bytes of a row, filled up to whole tiles.
        mode: what runs it; not ``rocm``, where nothing rounds as exactly.

    Returns:
        Planes int8 [4, M, width], zeros past K; sums of a token's codes, int32 [M]; and what
        multiplies a token, float32 [M].
    """
    m, k = x.shape
    block = 1 << (4 * width - 1).bit_length()

    def kernel(x_ref: Ref, planes: Ref, sums: Ref, factors: Ref) -> None:
        token = pl.program_id(0)
        at = lax.iota(jnp.int32, block)
        x = plgpu.load(x_ref.at[token, at], mask=at < k, other=jnp.zeros((), x_ref.dtype))
        x = x.astype(jnp.float32)
        largest = jnp.maximum(jnp.max(jnp.abs(x)), EPSILON)
        scale = _reciprocal(largest, mode) * 127.0
        codes = jnp.clip(_round_product(x, scale, mode), -128, 127)
        sums[token] = jnp.sum(codes)
        # The largest of a row leaves out what is not a number: it becomes visible here.
        factors[token] = _reciprocal(scale, mode) + jnp.sum(x * 0.0)
        plgpu.store(
            planes.at[at & 3, jnp.full((block,), token), at >> 2],
            codes.astype(jnp.int8),
            mask=at < 4 * width,
        )

    shapes = (((4, m, width), jnp.int8), ((m,), jnp.int32), ((m,), jnp.float32))
    planes, sums, factors = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(*shape) for shape in shapes],
        grid=(m,),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
        interpret=mode == "interpret",
        name="ternary_quantize",
    )(x)
    return planes, sums, factors


def _reciprocal(x: jax.Array, mode: Mode) -> jax.Array:
    """1/x, correctly rounded: Triton's own division isn't."""
    if mode != "cuda":
        return 1.0 / x
    # Triton's inline PTX is for vectors: one of equal numbers.
    (vector,) = plgpu.elementwise_inline_asm(
        "rcp.rn.f32 $0, $1;",
        args=[jnp.full((32,), x)],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct((32,), jnp.float32)],
    )
    return jnp.max(vector)


def _round_product(x: jax.Array, scale: jax.Array, mode: Mode) -> jax.Array:
    """``rint(x · scale)`` as int32, each step rounded by itself; 0 for what is not a number."""
    if mode != "cuda":
        product = x * scale
        return jnp.where(jnp.isnan(product), 0.0, jnp.rint(product)).astype(jnp.int32)
    return plgpu.elementwise_inline_asm(
        "{ .reg .f32 t; mul.rn.f32 t, $1, $2; cvt.rni.s32.f32 $0, t; }",
        args=[x, jnp.full(x.shape, scale)],
        constraints="=r,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.int32)],
    )[0]
