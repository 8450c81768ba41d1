"""Loops over tiles of a table's rows, so that no converted copy of the whole table exists."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from fabric_kernels.table_matmul.dot import dot

Tile = tuple[jax.Array, jax.Array, jax.Array]
"""First row, which rows are new (bool [tile]), values [tile, K]."""


def over_tiles(
    add: Callable[[jax.Array, Tile], jax.Array],
    out: jax.Array,
    *,
    rows: int,
    tile: int,
    read: Callable[[jax.Array, int], jax.Array],
) -> jax.Array:
    """Folds ``add`` over tiles of a table of ``rows`` rows.

    The last tile ends with the last row, so it may begin with rows of the one before. Tiles are cut
    by an index of the loop: what depends on it can't be moved out, where XLA would otherwise keep
    a converted copy of the whole table.

    Args:
        add: the new accumulator from the old one and a tile.
        out: the accumulator.
        rows: of the table.
        tile: rows of a tile, at most ``rows``.
        read: the values of ``tile`` rows from a first one on.
    """

    def body(out: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        begin = index * tile
        start = jnp.minimum(begin, rows - tile)
        fresh = start + jnp.arange(tile, dtype=jnp.int32) >= begin
        return add(out, (start, fresh, read(start, tile))), None

    return lax.scan(body, out, jnp.arange(-(-rows // tile), dtype=jnp.int32))[0]


def tiled_product(
    x: jax.Array, *, rows: int, tile: int, read: Callable[[jax.Array, int], jax.Array]
) -> jax.Array:
    """``x[..., K] · table[N, K]^T``, float32 [..., N]; see :func:`over_tiles`."""

    def add(out: jax.Array, part: Tile) -> jax.Array:
        # Rows that the tile before had too are written again, with the same numbers.
        start, _, values = part
        return lax.dynamic_update_slice_in_dim(out, dot(x, values, 1), start, x.ndim - 1)

    zeros = jnp.zeros((*x.shape[:-1], rows), jnp.float32)
    return over_tiles(add, zeros, rows=rows, tile=tile, read=read)


def tiled_transposed(
    g: jax.Array, *, k: int, tile: int, read: Callable[[jax.Array, int], jax.Array]
) -> jax.Array:
    """``g[..., N] · table[N, K]``, float32 [..., K]; see :func:`over_tiles`."""

    def add(out: jax.Array, part: Tile) -> jax.Array:
        start, fresh, values = part
        columns = lax.dynamic_slice_in_dim(g, start, tile, g.ndim - 1)
        return out + dot(jnp.where(fresh, columns, jnp.zeros_like(columns)), values, 0)

    zeros = jnp.zeros((*g.shape[:-1], k), jnp.float32)
    return over_tiles(add, zeros, rows=g.shape[-1], tile=tile, read=read)
