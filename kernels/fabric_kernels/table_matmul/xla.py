"""Products with a table of floats on XLA.

The table is cast to the dtype of the activations. XLA would cast all of it at once, and on GPU
pads its rows too where their number suits no kernel, a second head beside the first: a large
table is taken by tiles of rows instead.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from fabric_kernels.table_matmul.dot import dot, row_product
from fabric_kernels.table_matmul.tiles import tiled_product, tiled_transposed

TILE_BYTES = 16 << 20
"""Of rows in the dtype of the activations at one time, unless what they are multiplied with, or
give, is larger."""
ALIGNMENT = 128
"""Of the rows of a tile, so that no kernel needs them padded."""


def tile_rows(n: int, k: int, dtype: jnp.dtype, others: int = 0) -> int | None:
    """Rows of a tile; None where the whole table is small enough.

    ``others`` are the bytes of the larger one of what the table is multiplied with and gives.
    """
    width, size = k * jnp.dtype(dtype).itemsize, max(TILE_BYTES, others // 2)
    if n * width <= TILE_BYTES:
        return None
    return min(n, max(ALIGNMENT, size // width // ALIGNMENT * ALIGNMENT))


def product(x: jax.Array, table: jax.Array) -> jax.Array:
    """``x[..., K] · table[N, K]^T``, float32 [..., N]."""
    rows, k = table.shape
    if x.size == k and jax.default_backend() != "cpu":
        return row_product(x, table)
    tile = tile_rows(rows, k, x.dtype, 4 * x.size // k * rows)
    if tile is None:
        return dot(x, table, 1)
    return tiled_product(x, rows=rows, tile=tile, read=_reader(table))


def transposed(g: jax.Array, table: jax.Array) -> jax.Array:
    """``g[..., N] · table[N, K]``, float32 [..., K]."""
    rows, k = table.shape
    tile = tile_rows(rows, k, g.dtype, 4 * g.size)
    if tile is None:
        return dot(g, table, 0)
    return tiled_transposed(g, k=k, tile=tile, read=_reader(table))


def _reader(table: jax.Array) -> Callable[[jax.Array, int], jax.Array]:
    return lambda start, tile: lax.dynamic_slice_in_dim(table, start, tile)
