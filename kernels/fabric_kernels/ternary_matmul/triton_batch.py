"""Pallas-Triton kernels for tens of tokens: a step of decoding of a batch.

Two launches: a program a token gates, normalises and quantises it; then the products of all
matrices that read it, on matrix units, which add a residual where there is one. Weights are what
takes time to read, so a program has few rows of them and all tokens, and there are as many programs
as the GPU has multiprocessors.
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

from fabric_kernels.absmax import absmax_quantize, rounded
from fabric_kernels.packing import CODES_PER_BYTE
from fabric_kernels.ternary_matmul.triton_few_tokens import (
    Row,
    quantized_row,
)
from fabric_kernels.ternary_matmul.triton_kernels import (
    Ref,
    Tile,
    codes_of_planes,
    contract,
    inside,
    load_packed,
    run_parts,
    scale_at,
    store,
)
from fabric_kernels.triton_call import Mode
from fabric_kernels.triton_programs import program_id


@dataclass(frozen=True)
class BatchCodes:
    """Tokens as the products take them.

    Attributes:
        planes: int8 [4, M', W'], zeros past a row of K; rows past M may be anything.
        sums: int32 [M'], of a token's codes.
        factors: float32 [M'], what multiplies a token's products.
    """

    planes: jax.Array
    sums: jax.Array
    factors: jax.Array


def batch_codes(row: Row, layer: jax.Array, shape: tuple[int, int], *, mode: Mode) -> BatchCodes:
    """Tokens gated, normalised and quantised, a program each.

    Args:
        row: the tokens, floats; its residual is not read.
        layer: int32 [1], of a stack of gains.
        shape: M' and W'.
        mode: what runs it; not ``rocm``, where nothing rounds as exactly.
    """
    names = [name for name in row.operands if name != "residual"]
    rows, width = shape
    warps = 4 if width <= 512 else 16 if width > 2048 or row.gate is not None else 8

    def kernel(*refs: Ref) -> None:
        tokens, (index, planes, sums, factors) = dict(zip(names, refs, strict=False)), refs[-4:]
        t = program_id(mode)
        columns = lax.iota(jnp.int32, 1 << (width - 1).bit_length())
        codes, factor = quantized_row(
            tokens, (row.activation, row.eps), (t, index[0]), columns, mode
        )
        for j, plane in enumerate(codes):
            plgpu.store(planes.at[j, t, columns], plane.astype(jnp.int8), mask=columns < width)
        sums[t] = jnp.sum((codes[0] + codes[1]) + (codes[2] + codes[3]))
        factors[t] = jnp.max(factor((32,)))

    planes, sums, factors = pl.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct((CODES_PER_BYTE, rows, width), jnp.int8),
            jax.ShapeDtypeStruct((rows,), jnp.int32),
            jax.ShapeDtypeStruct((rows,), jnp.float32),
        ],
        grid=(row.x.shape[0],),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        interpret=mode == "interpret",
        name="ternary_batch_codes",
    )(*(row.operands[name] for name in names), layer)
    return BatchCodes(planes, sums, factors)


def codes_by_xla(x: jax.Array, shape: tuple[int, int]) -> BatchCodes:
    """The same of [M, K], where a kernel's division and rounding aren't exact."""
    codes, scale = absmax_quantize(x)
    bottom, right = shape[0] - x.shape[0], CODES_PER_BYTE * shape[1] - x.shape[1]
    codes = jnp.pad(codes, ((0, bottom), (0, right)))
    planes = codes.reshape(*shape, CODES_PER_BYTE).transpose(2, 0, 1)
    factors = jnp.pad(1.0 / scale[:, 0], (0, bottom))
    return BatchCodes(planes, jnp.sum(codes, axis=-1, dtype=jnp.int32), factors)


def batch_products(
    codes: BatchCodes,
    packed: Sequence[jax.Array],
    layers: Sequence[jax.Array],
    scales: Sequence[jax.Array],
    residual: jax.Array | None,
    tile: Tile,
    *,
    m: int,
    mode: Mode,
    dtype: Any,
) -> tuple[jax.Array, ...]:
    """Products of some tokens and several ``ternary2`` matrices, in one launch.

    Args:
        codes: the tokens.
        packed: uint8 [L, N, W] each, with the same W.
        layers: int32 [1] each.
        scales: float32 [L] or [1] each.
        residual: [m, N], what the product of the only matrix is added to; or None.
        tile: sizes; tile.m is M'.
        m: tokens.
        mode: what runs it.
        dtype: of the results.

    Returns:
        [m, N] each.
    """
    groups = list(zip(layers, packed, scales, strict=True))
    programs = [pl.cdiv(p.shape[1], tile.n) for p in packed]

    def kernel(x: Ref, sums: Ref, factors: Ref, groups: Any, residual: Any, *outputs: Ref) -> None:
        tokens = (x, sums, factors)
        run_parts(
            [
                (count, partial(_product, tokens, group, residual, out, tile, mode))
                for count, group, out in zip(programs, groups, outputs, strict=True)
            ],
            mode,
        )

    return tuple(
        pl.pallas_call(
            kernel,
            out_shape=[jax.ShapeDtypeStruct((m, p.shape[1]), dtype) for p in packed],
            grid=(sum(programs),),
            compiler_params=tile.params(),
            interpret=mode == "interpret",
            name="ternary_batch_product",
        )(codes.planes, codes.sums, codes.factors, groups, residual)
    )


def _product(
    tokens: tuple[Ref, Ref, Ref],
    group: tuple[Ref, Ref, Ref],
    residual: Ref | None,
    out: Ref,
    tile: Tile,
    mode: Mode,
    program: jax.Array,
) -> None:
    """All tokens by tile.n rows of a matrix."""
    (x, sums, factors), (layer, packed, scale) = tokens, group
    row, index = program * tile.n, layer[0]
    # Asked for now, they are there when the sums are.
    ones, factor = sums[:], factors[:] * scale_at(scale, index)
    before = None
    if residual is not None:
        at = residual.at[pl.ds(0, tile.m), pl.ds(row, tile.n)]
        mask = inside(out, (tile.m, tile.n), 0, row)
        before = plgpu.load(at, mask=mask, other=jnp.zeros((), out.dtype))

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        at = i * tile.w
        # Tokens first: the address of weights is known only when the layer has been read.
        planes = [x[j, :, pl.ds(at, tile.w)] for j in range(CODES_PER_BYTE)]
        v = load_packed(packed, index, tile, row, at)
        fields = codes_of_planes(v, x.dtype, "ternary2", mode)
        for plane, field in zip(planes, fields, strict=True):
            # The weights are the left operand: it may stay in registers, where it is unpacked.
            total = total + contract(field, plane, (1, 1), jnp.int32)
        return total

    total = lax.fori_loop(0, x.shape[2] // tile.w, step, jnp.zeros((tile.n, tile.m), jnp.int32))
    y = rounded((total - ones[None, :]).astype(jnp.float32) * factor[None, :])
    y = y.astype(out.dtype).T
    store(out, y if before is None else before + y, 0, row)
