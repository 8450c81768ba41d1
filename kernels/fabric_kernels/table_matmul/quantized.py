"""Products with a table of integers, de-quantised a tile of rows at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from fabric_kernels.block_quantization import BlockTable, dequantize_blocks, no_gradient
from fabric_kernels.table_matmul.dot import dot

TILE_BYTES = 8 << 20
"""Of rows that are float32 at one time."""


def tile_rows(n: int, k: int) -> int:
    """Rows of a tile."""
    return max(1, min(n, TILE_BYTES // (4 * k)))


@jax.custom_vjp
def block_product(x: jax.Array, table: BlockTable) -> jax.Array:
    """``x[..., K] · table[N, K]^T``, float32 [..., N]; no gradient by the table."""
    n, _ = table.shape

    def add(out: jax.Array, start: jax.Array, fresh: jax.Array, rows: jax.Array) -> jax.Array:
        # Rows that the tile before had too are written again, with the same numbers.
        del fresh
        return lax.dynamic_update_slice_in_dim(out, dot(x, rows, 1), start, x.ndim - 1)

    return _over_tiles(add, jnp.zeros((*x.shape[:-1], n), jnp.float32), table, x.dtype)


@jax.custom_vjp
def block_transposed(g: jax.Array, table: BlockTable) -> jax.Array:
    """``g[..., N] · table[N, K]``, float32 [..., K]; no gradient by the table."""
    tile = tile_rows(*table.shape)

    def add(out: jax.Array, start: jax.Array, fresh: jax.Array, rows: jax.Array) -> jax.Array:
        part = lax.dynamic_slice_in_dim(g, start, tile, g.ndim - 1)
        return out + dot(jnp.where(fresh, part, 0), rows, 0)

    return _over_tiles(add, jnp.zeros((*g.shape[:-1], table.k), jnp.float32), table, g.dtype)


def _over_tiles(
    add: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array],
    out: jax.Array,
    table: BlockTable,
    dtype: jnp.dtype,
) -> jax.Array:
    """Folds ``add(out, first row, which rows are new, values)`` over tiles of the table.

    The last tile ends with the last row, so it may begin with rows of the one before. Tiles are cut
    by an index of the loop: what depends on it can't be moved out, where XLA would otherwise keep
    a de-quantised copy of the whole table.
    """
    n, k = table.shape
    tile = tile_rows(n, k)

    def body(out: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        begin = index * tile
        start = jnp.minimum(begin, n - tile)
        codes, scales = (
            lax.dynamic_slice_in_dim(part, start, tile) for part in (table.codes, table.scales)
        )
        rows = dequantize_blocks(BlockTable(codes, scales, k), dtype)
        fresh = start + jnp.arange(tile, dtype=jnp.int32) >= begin
        return add(out, start, fresh, rows), None

    return lax.scan(body, out, jnp.arange(-(-n // tile), dtype=jnp.int32))[0]


def _product_fwd(x: jax.Array, table: BlockTable) -> tuple[jax.Array, tuple[BlockTable, jax.Array]]:
    return block_product(x, table), (table, jnp.zeros((0,), x.dtype))


def _product_bwd(
    residuals: tuple[BlockTable, jax.Array], g: jax.Array
) -> tuple[jax.Array, BlockTable]:
    table, like = residuals
    dx: jax.Array = block_transposed(g.astype(like.dtype), table)
    return dx.astype(like.dtype), no_gradient(table)


def _transposed_bwd(
    residuals: tuple[BlockTable, jax.Array], h: jax.Array
) -> tuple[jax.Array, BlockTable]:
    table, like = residuals
    dg: jax.Array = block_product(h.astype(like.dtype), table)
    return dg.astype(like.dtype), no_gradient(table)


def _transposed_fwd(
    g: jax.Array, table: BlockTable
) -> tuple[jax.Array, tuple[BlockTable, jax.Array]]:
    return block_transposed(g, table), (table, jnp.zeros((0,), g.dtype))


block_product.defvjp(_product_fwd, _product_bwd)
block_transposed.defvjp(_transposed_fwd, _transposed_bwd)
