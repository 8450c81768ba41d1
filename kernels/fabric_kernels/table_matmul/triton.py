"""Products with a table of floats on GPUs, of so few rows that reading the table takes the time."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from fabric_kernels.triton_call import kernel_module, on_platform

MOST_ROWS = 64
HALVES = (jnp.bfloat16, jnp.float16)
_MOST_ELEMENTS = 1 << 31
"""Triton's offsets are of 32 bits, signed."""
_SHARED_BYTES = 96 << 10
"""Of the pipeline of loads: what the smaller NVIDIA GPUs since Ampere have."""
_PROGRAMS = 128
"""Among which a transposed product is cut: about one for each multiprocessor."""


def takes(x: jax.Array, table: jax.Array) -> bool:
    """Whether the products are for these: half precision, more than one row and few of them."""
    rows = x.size // max(1, x.shape[-1])
    known = any(x.dtype == dtype for dtype in HALVES) and jnp.issubdtype(table.dtype, jnp.floating)
    return known and 1 < rows <= MOST_ROWS and 0 < table.size < _MOST_ELEMENTS


def product(x: jax.Array, table: jax.Array) -> jax.Array:
    """``x[..., K] · table[N, K]^T``, float32 [..., N]: the table cast a tile at a time."""
    kernels = kernel_module("fabric_kernels.table_matmul.triton_kernels")
    rows = x.reshape(-1, x.shape[-1])
    tile = kernels.Tile(m=max(16, 1 << (len(rows) - 1).bit_length()))
    stage = tile.k * (tile.n * table.dtype.itemsize + tile.m * x.dtype.itemsize)
    tile = replace(tile, stages=max(1, min(4, _SHARED_BYTES // stage)))
    y = on_platform(partial(kernels.product, tile=tile), rows, table)
    return y.reshape(*x.shape[:-1], table.shape[0])


def transposed(g: jax.Array, table: jax.Array) -> jax.Array:
    """``g[..., N] · table[N, K]``, float32 [..., K]: the table cast a tile at a time."""
    kernels = kernel_module("fabric_kernels.table_matmul.triton_kernels")
    rows, (n, k) = g.reshape(-1, g.shape[-1]), table.shape
    strip = kernels.Strip(m=max(16, 1 << (len(rows) - 1).bit_length()))
    stage = strip.n * (strip.k * table.dtype.itemsize + strip.m * g.dtype.itemsize)
    parts = max(1, min(_PROGRAMS // -(-k // strip.k), n // strip.n))
    strip = replace(strip, parts=parts, stages=max(1, min(4, _SHARED_BYTES // stage)))
    y = on_platform(partial(kernels.transposed, strip=strip), rows, table)
    return y.reshape(*g.shape[:-1], k)
