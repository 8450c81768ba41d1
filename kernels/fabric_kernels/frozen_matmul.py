"""Products with a frozen matrix of halves or of integers, alone or as one layer of a stack."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from fabric_kernels.block_quantization import BlockTable, dequantize_blocks
from fabric_kernels.table_matmul.dot import dot
from fabric_kernels.table_matmul.tiles import tiled_product, tiled_transposed
from fabric_kernels.table_matmul.xla import tile_rows


@partial(jax.tree_util.register_dataclass, data_fields=["values", "layer"], meta_fields=[])
@dataclass(frozen=True)
class FrozenWeight:
    """What stands for a frozen weight [N, K].

    A layer of a stack is named by index and read where it lies. A slice that ``lax.scan`` made
    would be kept for the backward pass by every layer: a copy of the stack.

    Attributes:
        values: floats or codes with scales, [N, K], or [L, N, K] for a stack of layers.
        layer: int32 [], which layer of the stack; None where there is no stack.
    """

    values: jax.Array | BlockTable
    layer: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix, [N, K]."""
        n, k = self.values.shape[-2:]
        return n, k

    def check(self) -> None:
        """Raises TypeError or ValueError where dtypes or shapes don't fit."""
        dims = 2 if self.layer is None else 3
        if len(self.values.shape) != dims:
            stack = "" if self.layer is None else "L, "
            raise ValueError(
                f"a frozen weight has shape [{stack}N, K], found {list(self.values.shape)}"
            )
        if isinstance(self.values, BlockTable):
            self.values.check()

    def rows(self, start: jax.Array, count: int, dtype: DTypeLike) -> jax.Array:
        """``count`` rows from the first one on, in ``dtype`` [count, K]."""
        if isinstance(self.values, BlockTable):
            parts = self.values.codes, self.values.scales
            codes, scales = (_cut(part, self.layer, start, count) for part in parts)
            return dequantize_blocks(BlockTable(codes, scales, self.values.k), dtype)
        values, layer = self.values, self.layer
        if values.dtype == jnp.bfloat16:
            # XLA on CPU slices bfloat16 as float32. Behind the barrier, which layer and row tie to
            # the loops that they come from, it can't widen the whole stack in front of those.
            values, layer, start = lax.optimization_barrier((values, layer, start))
        return _cut(values, layer, start, count).astype(dtype)


def _cut(part: jax.Array, layer: jax.Array | None, start: jax.Array, count: int) -> jax.Array:
    """Some rows of [N, W], or of one layer of [L, N, W]."""
    if layer is None:
        return lax.dynamic_slice_in_dim(part, start, count)
    first = (layer.astype(jnp.int32), start, jnp.int32(0))
    return lax.dynamic_slice(part, first, (1, count, part.shape[-1]))[0]


def frozen_matmul(x: jax.Array, weight: FrozenWeight) -> jax.Array:
    """``x[..., K] · weight[N, K]^T``, summed in float32, in the dtype of ``x``: [..., N].

    The weight is cast or de-quantised to the dtype of ``x``, 16 MiB of its rows at a time.
    Differentiable in ``x`` alone: ``dx = g · weight``, cast in the same way.

    Args:
        x: [..., K], floats.
        weight: of N outputs and K inputs.

    Raises:
        TypeError, ValueError: dtypes or shapes do not fit.
    """
    weight.check()
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"the last axes of x and of a weight [N, K] are contracted, "
            f"found {list(x.shape)} and {list(weight.shape)}"
        )
    return _product(x, weight)


@jax.custom_vjp
def _product(x: jax.Array, weight: FrozenWeight) -> jax.Array:
    n, k = weight.shape
    tile = tile_rows(n, k, x.dtype)
    if tile is None:
        return dot(x, weight.rows(jnp.int32(0), n, x.dtype), 1).astype(x.dtype)
    read = partial(_read, weight, x.dtype)
    return tiled_product(x, rows=n, tile=tile, read=read).astype(x.dtype)


def _transposed(g: jax.Array, weight: FrozenWeight) -> jax.Array:
    """``g[..., N] · weight[N, K]`` in the dtype of ``g``."""
    n, k = weight.shape
    tile = tile_rows(n, k, g.dtype)
    if tile is None:
        return dot(g, weight.rows(jnp.int32(0), n, g.dtype), 0).astype(g.dtype)
    return tiled_transposed(g, k=k, tile=tile, read=partial(_read, weight, g.dtype)).astype(g.dtype)


def _read(weight: FrozenWeight, dtype: DTypeLike, start: jax.Array, tile: int) -> jax.Array:
    return weight.rows(start, tile, dtype)


def _forward(x: jax.Array, weight: FrozenWeight) -> tuple[jax.Array, FrozenWeight]:
    return _product(x, weight), weight


def _backward(weight: FrozenWeight, g: jax.Array) -> tuple[jax.Array, None]:
    # None is a gradient of zero that no array stands for.
    return _transposed(g, weight), None


_product.defvjp(_forward, _backward)
