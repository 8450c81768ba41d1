"""Products with a table of floats on XLA.

The table is cast to the dtype of the activations. XLA would cast all of it at once, and on GPU
pads its rows too where their number suits no kernel, a second head beside the first: a large
table is taken by tiles of rows instead.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from fabric_kernels.table_matmul.dot import dot
from fabric_kernels.table_matmul.tiles import tiled_product, tiled_transposed

TILE_BYTES = 16 << 20
"""Of rows in the dtype of the activations at one time."""
ALIGNMENT = 128
"""Of the rows of a tile, so that no kernel needs them padded."""


def tile_rows(n: int, k: int, dtype: jnp.dtype) -> int | None:
    """Rows of a tile; None where the whole table is small enough."""
    width = k * jnp.dtype(dtype).itemsize
    if n * width <= TILE_BYTES:
        return None
    return min(n, max(ALIGNMENT, TILE_BYTES // width // ALIGNMENT * ALIGNMENT))


def product(x: jax.Array, table: jax.Array) -> jax.Array:
    """``x[..., K] · table[N, K]^T``, float32 [..., N]."""
    rows, k = table.shape
    tile = tile_rows(rows, k, x.dtype)
    if tile is None:
        return dot(x, table, 1)
    return tiled_product(x, rows=rows, tile=tile, read=_reader(table))


def transposed(g: jax.Array, table: jax.Array) -> jax.Array:
    """``g[..., N] · table[N, K]``, float32 [..., K]."""
    rows, k = table.shape
    tile = tile_rows(rows, k, g.dtype)
    if tile is None:
        return dot(g, table, 0)
    return tiled_transposed(g, k=k, tile=tile, read=_reader(table))


def _reader(table: jax.Array) -> Callable[[jax.Array, int], jax.Array]:
    return lambda start, tile: lax.dynamic_slice_in_dim(table, start, tile)
