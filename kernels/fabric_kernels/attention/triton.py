"""The GPU implementation: Pallas-Triton kernels for NVIDIA and, by lowering, AMD.

No array of queries by keys is made but the codes of the mask, a byte each. The forward pass leaves
one float32 number a query and head for the backward pass. Products are of operands in the dtype of
the inputs, weights and their gradients rounded to it; sums and the softmax are float32.

``vmap`` adds an axis to the grid of programs. A program over several devices runs the kernels on
whole arrays, unless it maps over its batch itself (``jax.shard_map`` with ``check_vma=False``).
"""

from dataclasses import dataclass
from functools import partial
from math import inf
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from fabric_kernels.triton_call import Mode, kernel_module, on_platform

if TYPE_CHECKING:
    from fabric_kernels.attention.triton_kernels import Tile

LOG2_E = 1.4426950408889634
# By the most channels of a head: queries, keys, warps, stages of the three kernels.
_Sizes = dict[float, tuple[tuple[int, int, int, int], ...]]
SIZES: _Sizes = {
    64: ((128, 64, 4, 3), (128, 64, 4, 2), (64, 64, 4, 2)),
    128: ((64, 64, 4, 2), (64, 64, 4, 1), (32, 64, 4, 2)),
    inf: ((64, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
}
WIDE_SIZES: _Sizes = {
    64: ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    inf: ((16, 16, 4, 1), (16, 16, 8, 1), (16, 16, 4, 1)),
}
"""For float32, which has no matrix units: these products are unrolled."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Sizes for each of the kernels."""

    forward: "Tile"
    query_gradients: "Tile"
    key_gradients: "Tile"


def kernels() -> ModuleType:
    """The module of the kernels; as ``kernel_module``."""
    return kernel_module("fabric_kernels.attention.triton_kernels")


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    scale: float,
    *,
    tiles: Tiles | None = None,
) -> jax.Array:
    """``softmax(scale · q·k^T)·v`` where ``mask`` is true; only first gradients, in reverse mode.

    Args:
        q: [B, T, H, hd], floats; any but bfloat16, float16 and float32 are computed in float32.
        k: [B, S, K, hd], K a divisor of H.
        v: [B, S, K, hd].
        mask: bool [B, T, S]. A query that sees nothing gets the mean of all values.
        scale: factor on the scores.
        tiles: sizes; without them, those that suit the shapes.

    Returns:
        [B, T, H, hd] in the dtype of q.

    Raises:
        NotImplementedError: this JAX has no Pallas Triton, or the mask is too large for it.
    """
    # There Pallas would count the bytes of its codes in 32 bits, of which one is a sign.
    if 2**31 <= mask.size <= 2**32:
        raise NotImplementedError(
            f"the Triton kernels take no mask of 2 to 4 GiB, found {list(mask.shape)}; "
            f"use implementation xla"
        )
    dtype = jnp.result_type(q, k, v)
    if dtype.name not in ("bfloat16", "float16", "float32"):
        dtype = jnp.dtype(jnp.float32)
    if tiles is None:
        tiles = choose_tiles(q.shape[1], k.shape[1], q.shape[3], dtype)
    if q.size == 0:
        return jnp.zeros_like(q)
    inputs = (x.astype(dtype) for x in (q, k, v))
    return lax.convert_element_type(_attention(scale, tiles, *inputs, mask), q.dtype)


def choose_tiles(queries: int, keys: int, width: int, dtype: jnp.dtype) -> Tiles:
    """Sizes whose operands fit 96 KiB of shared memory and whose sums fit the registers."""
    make = kernels().Tile
    sizes = WIDE_SIZES if dtype == jnp.float32 else SIZES
    chosen = next(of_kernels for most, of_kernels in sizes.items() if width <= most)

    def fit(tile: tuple[int, int, int, int]) -> "Tile":
        rows, columns = (max(1 << (count - 1).bit_length(), 16) for count in (queries, keys))
        a, b, warps, stages = tile
        return make(queries=min(a, rows), keys=min(b, columns), warps=warps, stages=stages)

    forward, query_gradients, key_gradients = (fit(tile) for tile in chosen)
    return Tiles(forward=forward, query_gradients=query_gradients, key_gradients=key_gradients)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    scale: float, tiles: Tiles, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> jax.Array:
    return _attention_fwd(scale, tiles, q, k, v, mask)[0]


def _attention_fwd(
    scale: float, tiles: Tiles, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    module, tile = kernels(), tiles.forward
    codes = mask_codes(mask)

    def call(*args: Any, mode: Mode) -> Any:
        return module.forward(*args, _factors(scale), tile, mode=mode)

    out, logs = on_platform(call, q, k, v, codes, survey(codes, tiles)[0])
    return out, (q, k, v, mask, out, logs)


def _attention_bwd(
    scale: float, tiles: Tiles, residuals: tuple[jax.Array, ...], g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, mask, out, logs = residuals
    module, factors = kernels(), _factors(scale)
    codes = mask_codes(mask)
    _, of_queries, of_keys = survey(codes, tiles)

    def call(*args: Any, mode: Mode) -> Any:
        q, k, v, codes, of_queries, of_keys, out, logs, g = args
        dq, deltas = module.query_gradients(
            q, k, v, codes, of_queries, (out, logs, g), factors, tiles.query_gradients, mode=mode
        )
        dk, dv = module.key_gradients(
            q, k, v, codes, of_keys, (logs, deltas, g), factors, tiles.key_gradients, mode=mode
        )
        return dq, dk, dv

    dq, dk, dv = on_platform(
        call, q, k, v, codes, of_queries, of_keys, out, logs, g.astype(q.dtype)
    )
    return dq, dk, dv, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _factors(scale: float) -> tuple[float, float]:
    return scale * LOG2_E, scale


# ---- the mask ----------------------------------------------------------------------------------


def mask_codes(mask: jax.Array) -> jax.Array:
    """Int8 [B, T, S]: 1 where a key is seen, 2 for all keys of a query that sees none, else 0."""
    module = kernels()
    nothing = jnp.any(mask, axis=-1, keepdims=True)
    rest = jnp.where(nothing, jnp.int8(module.HIDDEN), jnp.int8(module.BLIND))
    return jnp.where(mask, jnp.int8(module.SEEN), rest)


def survey(codes: jax.Array, tiles: Tiles) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The bounds of tiles that the kernels of ``tiles`` read: forward, of queries, of keys.

    The codes are read once, by the smallest tiles, of which the others are made.
    """
    module = kernels()
    sizes = (tiles.forward, tiles.query_gradients, tiles.key_gradients)
    rows, columns = min(tile.queries for tile in sizes), min(tile.keys for tile in sizes)
    fine = _merge(codes != module.HIDDEN, codes == module.SEEN, rows, columns)
    forward, queries, keys = (
        _merge(*fine, tile.queries // rows, tile.keys // columns) for tile in sizes
    )
    return tile_bounds(*forward), tile_bounds(*queries), tile_bounds(keys[0].mT, keys[1].mT)


def _merge(
    some: jax.Array, every: jax.Array, rows: int, columns: int
) -> tuple[jax.Array, jax.Array]:
    """Of tiles [B, queries, keys] those of ``rows`` x ``columns``: any in them, and all.

    Queries past the last do not matter; keys past the last are not there.
    """
    if rows == columns == 1:
        return some, every
    batch, queries, keys = some.shape
    more_rows, more_columns = (0, -queries % rows), (0, -keys % columns)
    some = jnp.pad(some, ((0, 0), more_rows, more_columns))
    every = jnp.pad(every, ((0, 0), (0, 0), more_columns))
    every = jnp.pad(every, ((0, 0), more_rows, (0, 0)), constant_values=True)
    shape = (batch, some.shape[1] // rows, rows, some.shape[2] // columns, columns)
    return jnp.any(some.reshape(shape), axis=(2, 4)), jnp.all(every.reshape(shape), axis=(2, 4))


def tile_bounds(some: jax.Array, every: jax.Array) -> jax.Array:
    """Where the tiles with anything start and stop, and the first run of those that hold all.

    Int32 [B, rows, 4] from bool [B, rows, tiles].
    """
    count = some.shape[-1]
    place = lax.broadcasted_iota(jnp.int32, some.shape, some.ndim - 1)

    def first(flags: jax.Array) -> jax.Array:
        return jnp.min(jnp.where(flags, place, count), axis=-1)

    stop = jnp.max(jnp.where(some, place + 1, 0), axis=-1)
    start, whole_start = jnp.minimum(first(some), stop), first(every)
    whole_stop = first(~every & (place >= whole_start[..., None]))
    return jnp.stack([start, stop, whole_start, whole_stop], axis=-1)
