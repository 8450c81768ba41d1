"""Products with a table of integers, de-quantised a tile of rows at a time."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from fabric_kernels.block_quantization import BlockTable, dequantize_blocks, no_gradient
from fabric_kernels.table_matmul.dot import row_product
from fabric_kernels.table_matmul.tiles import tiled_product, tiled_transposed

TILE_BYTES = 8 << 20
"""Of rows that are float32 at one time."""


def tile_rows(n: int, k: int) -> int:
    """Rows of a tile."""
    return max(1, min(n, TILE_BYTES // (4 * k)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def block_product(on_cpu: bool, x: jax.Array, table: BlockTable) -> jax.Array:
    """``x[..., K] · table[N, K]^T``, float32 [..., N]; no gradient by the table."""
    rows, k = table.shape
    if on_cpu:
        out = jax.ShapeDtypeStruct((*x.shape[:-1], rows), jnp.float32)
        call = jax.ffi.ffi_call("fabric_block_table", out, vmap_method="sequential")
        return call(x.astype(jnp.float32), table.codes, table.scales)
    if x.size == k and jax.default_backend() != "cpu":
        return row_product(x, dequantize_blocks(table, x.dtype))
    return tiled_product(x, rows=rows, tile=tile_rows(*table.shape), read=_reader(table, x.dtype))


@jax.custom_vjp
def block_transposed(g: jax.Array, table: BlockTable) -> jax.Array:
    """``g[..., N] · table[N, K]``, float32 [..., K]; no gradient by the table."""
    return tiled_transposed(
        g, k=table.k, tile=tile_rows(*table.shape), read=_reader(table, g.dtype)
    )


def _reader(table: BlockTable, dtype: jnp.dtype) -> Callable[[jax.Array, int], jax.Array]:
    """De-quantises some rows."""

    def read(start: jax.Array, tile: int) -> jax.Array:
        codes, scales = (
            lax.dynamic_slice_in_dim(part, start, tile) for part in (table.codes, table.scales)
        )
        return dequantize_blocks(BlockTable(codes, scales, table.k), dtype)

    return read


def _product_fwd(
    on_cpu: bool, x: jax.Array, table: BlockTable
) -> tuple[jax.Array, tuple[BlockTable, jax.Array]]:
    return block_product(on_cpu, x, table), (table, jnp.zeros((0,), x.dtype))


def _product_bwd(
    _: bool, residuals: tuple[BlockTable, jax.Array], g: jax.Array
) -> tuple[jax.Array, BlockTable]:
    table, like = residuals
    dx: jax.Array = block_transposed(g.astype(like.dtype), table)
    return dx.astype(like.dtype), no_gradient(table)


def _transposed_bwd(
    residuals: tuple[BlockTable, jax.Array], h: jax.Array
) -> tuple[jax.Array, BlockTable]:
    table, like = residuals
    dg: jax.Array = block_product(False, h.astype(like.dtype), table)
    return dg.astype(like.dtype), no_gradient(table)


def _transposed_fwd(
    g: jax.Array, table: BlockTable
) -> tuple[jax.Array, tuple[BlockTable, jax.Array]]:
    return block_transposed(g, table), (table, jnp.zeros((0,), g.dtype))


block_product.defvjp(_product_fwd, _product_bwd)
block_transposed.defvjp(_transposed_fwd, _transposed_bwd)
