"""A Pallas-Triton launch for the input of a group: codes, factors and narrow products.

For a token it is one program, which sees the row once; for the adapters' ``scale · x · A^T`` one
for a block of tokens, in the same launch. Those of the same tokens are neighbours in the grid, so
what the second one reads lies in a cache.
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

from fabric_kernels.absmax import EPSILON
from fabric_kernels.low_rank import LowRank
from fabric_kernels.packing import CODES_PER_BYTE, DIGITS_PER_BYTE, Packing
from fabric_kernels.ternary_matmul.triton_kernels import (
    Columns,
    Ref,
    contract,
    load,
    padded_rank,
    scale_at,
)
from fabric_kernels.triton_call import Mode
from fabric_kernels.triton_exact import round_product, scalar_reciprocal
from fabric_kernels.triton_programs import program_id


@dataclass(frozen=True)
class Layout:
    """How codes are written.

    Attributes:
        rows: of the array; those past the tokens are left as they are.
        columns: of the array.
        packing: of the weights that the codes meet, in whose planes (``triton_kernels``) they are
            written, [P, rows, columns]; None for [rows, columns].
        width: bytes of a row of weights.
        turned: without a packing, whether each 64 codes of a row are in planes
            (``triton_group.turned``).
    """

    rows: int
    columns: int
    packing: Packing | None
    width: int
    turned: bool = False

    @property
    def planes(self) -> int:
        """P."""
        return {None: 1, "ternary2": CODES_PER_BYTE, "ternary1.6": DIGITS_PER_BYTE}[self.packing]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        planes = () if self.packing is None else (self.planes,)
        return (*planes, self.rows, self.columns)

    @property
    def written(self) -> int:
        """Codes of a row, those past K zeros."""
        return self.planes * (self.width if self.packing == "ternary1.6" else self.columns)

    def index(self, token: jax.Array, at: jax.Array) -> tuple[jax.Array, ...]:
        """Where the codes ``at`` of a token lie."""
        if self.turned:
            at = (at & -64) | ((at & 3) << 4) | ((at >> 2) & 15)
        if self.packing is None:
            return token, at
        tokens = jnp.full(at.shape, token)
        if self.packing == "ternary2":
            return at & 3, tokens, at >> 2
        return lax.div(at, self.width), tokens, lax.rem(at, self.width)


@dataclass(frozen=True)
class NarrowTile:
    """One program's work on a narrow product.

    Attributes:
        m: tokens.
        k: of the sums, at a time.
        stages: of the pipeline of loads.
    """

    m: int
    k: int
    stages: int = 3


def quantize(
    x: jax.Array,
    adapters: Sequence[LowRank],
    scales: Sequence[tuple[jax.Array, jax.Array]],
    layout: Layout,
    tile: NarrowTile,
    *,
    mode: Mode,
) -> tuple[jax.Array, jax.Array, list[jax.Array], jax.Array]:
    """``absmax_quantize``, and ``scale · x · A^T`` of adapters.

    Args:
        x: floats [M, K].
        adapters: their A is read in x's dtype; sums are float32.
        scales: of each matrix, float32 [L] or [1], and its layer int32 [1].
        layout: of the codes.
        tile: sizes.
        mode: what runs it; not ``rocm``, where nothing rounds as exactly.

    Returns:
        Codes int8 in ``layout``; their sums int32 [rows]; for each matrix what multiplies a token
        of its product, float32 [rows]; and the narrow products side by side, [M, sum of padded
        ranks] in x's dtype, zeros between them.
    """
    m = x.shape[0]
    blocks = pl.cdiv(m, tile.m)
    block = 1 << (layout.written - 1).bit_length()
    count, many = len(scales), len(adapters)

    def kernel(x: Ref, a: Any, scales: Any, *outputs: Ref) -> None:
        codes, sums, *factors = outputs[: 2 + count]
        narrow = side_by_side(outputs[-1], [a_ref.shape[0] for a_ref in a])
        turns = tile.m + many
        program = program_id(mode)
        at, turn = lax.div(program, turns), lax.rem(program, turns)
        for i in range(many):
            own = a[i], narrow[i], adapters[i].scale
            pl.when(turn == i)(partial(narrow_product, x, *own, tile, at))
        token = at * tile.m + turn - many
        pl.when((turn >= many) & (token < m))(
            partial(_quantize_row, x, scales, codes, sums, factors, layout, block, mode, token)
        )

    shapes = [(layout.shape, jnp.int8), ((layout.rows,), jnp.int32)]
    shapes += [((layout.rows,), jnp.float32)] * count
    ranks = sum(padded_rank(one.a.shape[0]) for one in adapters)
    shapes += [((m, ranks), x.dtype)] if ranks else []
    codes, sums, *rest = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(*shape) for shape in shapes],
        grid=(blocks * (tile.m + many),),
        compiler_params=plgpu.CompilerParams(
            num_warps=4 if block <= 4096 else 8, num_stages=tile.stages
        ),
        interpret=mode == "interpret",
        name="ternary_quantize_group",
    )(x, [one.a for one in adapters], list(scales))
    return codes, sums, rest[:count], rest[-1] if ranks else jnp.zeros((m, 0), x.dtype)


def side_by_side(values: Any, ranks: Sequence[int]) -> list[Columns]:
    """The narrow product of each adapter in the array of all, padded ranks one after another."""
    return [Columns(values, sum(map(padded_rank, ranks[:i])), rank) for i, rank in enumerate(ranks)]


def narrow_product(
    x: Ref, a: Ref, out: Columns, scale: float, tile: NarrowTile, block: jax.Array
) -> None:
    """``scale · x[M, K] · a[R, K]^T`` of a block of tokens."""
    row, rank = block * tile.m, padded_rank(a.shape[0])

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        at = i * tile.k
        part = load(x, (row, at), (tile.m, tile.k))
        return total + contract(part, load(a, (0, at), (rank, tile.k)).astype(x.dtype), (1, 1))

    zero = jnp.zeros((tile.m, rank), jnp.float32)
    out.store(lax.fori_loop(0, pl.cdiv(x.shape[1], tile.k), step, zero) * scale, row)


def _quantize_row(
    x: Ref,
    scales: Sequence[tuple[Ref, Ref]],
    codes: Ref,
    sums: Ref,
    factors: Sequence[Ref],
    layout: Layout,
    block: int,
    mode: Mode,
    token: jax.Array,
) -> None:
    k = x.shape[1]
    at = lax.iota(jnp.int32, block)
    inside = None if k == block else at < k
    other = None if k == block else jnp.zeros((), x.dtype)
    row = plgpu.load(x.at[token, at], mask=inside, other=other).astype(jnp.float32)
    largest = jnp.maximum(jnp.max(jnp.abs(row)), EPSILON)
    scale = scalar_reciprocal(largest, mode) * 127.0
    values = jnp.clip(round_product(row, scale, mode), -128, 127)
    sums[token] = jnp.sum(values)
    # The largest of a row leaves out what is not a number: it becomes visible here.
    factor = scalar_reciprocal(scale, mode) + jnp.sum(row * 0.0)
    for out, (of_matrix, layer) in zip(factors, scales, strict=True):
        out[token] = factor * scale_at(of_matrix, layer[0])
    mask = None if layout.written == block else at < layout.written
    plgpu.store(codes.at[*layout.index(token, at)], values.astype(jnp.int8), mask=mask)
