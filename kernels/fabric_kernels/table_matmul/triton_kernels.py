"""Pallas-Triton kernels for products of tens of rows with a table, which they read once."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from fabric_kernels.triton_call import Mode
from fabric_kernels.triton_programs import program_id

Ref = Any


@dataclass(frozen=True)
class Tile:
    """Sizes of one program's work.

    Attributes:
        m: rows of the activations, all of them.
        n: rows of the table.
        k: of the sums, at a time.
        warps: of 32 threads.
        stages: of the pipeline of loads.
    """

    m: int
    n: int = 64
    k: int = 128
    warps: int = 4
    stages: int = 1


def product(x: jax.Array, table: jax.Array, tile: Tile, *, mode: Mode) -> jax.Array:
    """``x[M, K] · table[N, K]^T`` as float32 [M, N], the table cast to the dtype of ``x``."""
    (m, _), n = x.shape, table.shape[0]
    return pl.pallas_call(
        partial(_product, tile=tile, mode=mode),
        out_shape=jax.ShapeDtypeStruct((m, n), jnp.float32),
        grid=(pl.cdiv(n, tile.n),),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=mode == "interpret",
        name="table_product",
    )(x, table)


def _product(x: Ref, table: Ref, out: Ref, *, tile: Tile, mode: Mode) -> None:
    row, k = program_id(mode) * tile.n, x.shape[1]

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        at = i * tile.k
        values = _load(table, row, at, (tile.n, tile.k)).astype(x.dtype)
        part = _load(x, 0, at, (tile.m, tile.k))
        dims = (((1,), (1,)), ((), ()))
        return total + lax.dot_general(values, part, dims, preferred_element_type=jnp.float32)

    zero = jnp.zeros((tile.n, tile.m), jnp.float32)
    total = lax.fori_loop(0, pl.cdiv(k, tile.k), step, zero)
    rows, columns = (lax.broadcasted_iota(jnp.int32, (tile.m, tile.n), axis) for axis in (0, 1))
    at = out.at[pl.ds(0, tile.m), pl.ds(row, tile.n)]
    plgpu.store(at, total.T, mask=(rows < out.shape[0]) & (row + columns < out.shape[1]))


@dataclass(frozen=True)
class Strip:
    """Sizes of one program's work of :func:`transposed`.

    Attributes:
        m: rows of the gradients, all of them.
        n: rows of the table at a time.
        k: columns of the table.
        parts: of the table's rows, each another program's.
        warps: of 32 threads.
        stages: of the pipeline of loads.
    """

    m: int
    n: int = 64
    k: int = 128
    parts: int = 1
    warps: int = 4
    stages: int = 1


def transposed(g: jax.Array, table: jax.Array, strip: Strip, *, mode: Mode) -> jax.Array:
    """``g[M, N] · table[N, K]`` as float32 [M, K], the table cast to the dtype of ``g``."""
    m, k = g.shape[0], table.shape[1]
    sums = pl.pallas_call(
        partial(_transposed, strip=strip, mode=mode),
        out_shape=jax.ShapeDtypeStruct((strip.parts, m, k), jnp.float32),
        grid=(pl.cdiv(k, strip.k) * strip.parts,),
        compiler_params=plgpu.CompilerParams(num_warps=strip.warps, num_stages=strip.stages),
        interpret=mode == "interpret",
        name="table_transposed",
    )(g, table)
    return jnp.sum(sums, axis=0)


def _transposed(g: Ref, table: Ref, out: Ref, *, strip: Strip, mode: Mode) -> None:
    program, steps = program_id(mode), pl.cdiv(table.shape[0], strip.n)
    part, column = lax.rem(program, strip.parts), lax.div(program, strip.parts) * strip.k
    each = pl.cdiv(steps, strip.parts)

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        at = i * strip.n
        values = _load(table, at, column, (strip.n, strip.k)).astype(g.dtype)
        own = _load(g, 0, at, (strip.m, strip.n))
        dims = (((1,), (0,)), ((), ()))
        return total + lax.dot_general(own, values, dims, preferred_element_type=jnp.float32)

    zero = jnp.zeros((strip.m, strip.k), jnp.float32)
    total = lax.fori_loop(part * each, jnp.minimum((part + 1) * each, steps), step, zero)
    rows, columns = (lax.broadcasted_iota(jnp.int32, total.shape, axis) for axis in (0, 1))
    at = out.at[part, pl.ds(0, strip.m), pl.ds(column, strip.k)]
    plgpu.store(at, total, mask=(rows < out.shape[1]) & (column + columns < out.shape[2]))


def _load(ref: Ref, row: Any, column: Any, shape: tuple[int, int]) -> jax.Array:
    """A block, zeros where the matrix has ended."""
    rows, columns = ref.shape
    at = ref.at[pl.ds(row, shape[0]), pl.ds(column, shape[1])]
    if rows % shape[0] == 0 and columns % shape[1] == 0:
        return plgpu.load(at)
    mask = row + lax.broadcasted_iota(jnp.int32, shape, 0) < rows
    if columns % shape[1]:
        mask = mask & (column + lax.broadcasted_iota(jnp.int32, shape, 1) < columns)
    return plgpu.load(at, mask=mask, other=jnp.zeros((), ref.dtype))
