"""A Pallas-Triton kernel for a step of decoding of a batch: turns, stores, attends in one launch.

A program has a key/value head of a row with all of its queries, and reads the slots in use once, on
matrix units: tiles are copied ahead of the products, and little is computed beside them. Sixteen
rows are what these units take; a query has two of them. Its weights are float32: one row has them
rounded to the dtype of the values, the other what that leaves, and both are added at the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from fabric_kernels.attention.cache import KVCache
from fabric_kernels.triton_call import Mode

Ref = Any
MOST_QUERIES = 8
"""Of a key/value head."""
ROWS = 2 * MOST_QUERIES
LOG2_E = 1.4426950408889634
FAR = -1e30
_ROUNDER = 1.5 * 2**23
"""Added and taken away it rounds a float32 of at most 2^22, half to even; XLA leaves it out."""


@dataclass(frozen=True)
class Tile:
    """One program's work.

    Attributes:
        slots: at a time, at least 16.
        warps: of 32 threads.
        stages: of the pipeline of loads.
    """

    slots: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Sums:
    """Of each row: the largest score, the weights' sum, and the weighted values [ROWS, hd]."""

    largest: jax.Array
    weights: jax.Array
    values: jax.Array


jax.tree_util.register_dataclass(Sums, ["largest", "weights", "values"], [])


def takes(q: jax.Array, cache: KVCache) -> bool:
    """Whether the kernel is for these: half precision, no more queries a head than it has rows."""
    stored = cache.keys.dtype
    known = q.dtype in (jnp.bfloat16, jnp.float16) and stored in (q.dtype, jnp.dtype(jnp.int8))
    return known and q.shape[2] <= MOST_QUERIES * cache.keys.shape[2]


def choose_tile(width: int, queries: int) -> Tile:
    """By hd, and the queries of a head."""
    del queries
    return Tile(32, 1, 3) if width <= 64 else Tile(32, 2, 3)


def cached_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: KVCache,
    layer: jax.Array,
    positions: jax.Array,
    first: jax.Array | None,
    angles: tuple[jax.Array, jax.Array],
    scale: float,
    *,
    mode: Mode,
) -> tuple[jax.Array, KVCache]:
    """As :func:`fabric_kernels.attention.cached_attention`, the shapes checked; the same arguments.

    Where :func:`takes` says so. Weights stay float32 where plain jax rounds them to the dtype of
    the values.
    """
    batch, _, heads, width = q.shape
    kv_heads = cache.keys.shape[2]
    stored = [cache.keys, cache.values]
    if cache.key_scales is not None and cache.value_scales is not None:
        stored += [cache.key_scales, cache.value_scales]
    inputs = [q, k, v, *angles, layer.reshape(1), positions]
    inputs += [] if first is None else [first]
    tile = choose_tile(width, heads // kv_heads)
    sizes = {"inputs": len(inputs), "count": len(stored), "tile": tile.slots}
    *kept, attended = pl.pallas_call(
        partial(_program, **sizes, factor=scale * LOG2_E, mode=mode),
        out_shape=[*[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in stored], q],
        grid=(kv_heads, batch),
        input_output_aliases={len(inputs) + i: i for i in range(len(stored))},
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=mode == "interpret",
        name="cached_attention_batch",
    )(*inputs, *stored)
    new = replace(cache, keys=kept[0], values=kept[1])
    if len(stored) > 2:
        new = replace(new, key_scales=kept[2], value_scales=kept[3])
    return attended, new


def _program(*refs: Ref, inputs: int, count: int, tile: int, factor: float, mode: Mode) -> None:
    q, k, v, cos, sin, layer, positions = refs[:7]
    first = refs[7:inputs]
    stored, new = refs[inputs : inputs + count], refs[inputs + count : inputs + 2 * count]
    own, row, out = pl.program_id(0), pl.program_id(1), refs[-1]
    (heads, width), slots = q.shape[2:], stored[0].shape[3]
    group = heads // stored[0].shape[2]
    position, at = positions[row, 0], (layer[0], row, own)
    # Two rows of each query; those of others are the first one over again, and are not stored.
    numbers = lax.rem(lax.iota(jnp.int32, ROWS), jnp.int32(MOST_QUERIES))
    query = own * group + jnp.where(numbers < group, numbers, 0)
    queries = _turned(q, row, query, (cos, sin))
    bounds = first[0][row, 0] if first else jnp.int32(0), jnp.minimum(position, slots)
    sums = _sums(stored, at, queries.astype(q.dtype), bounds, (tile, factor))

    one = jnp.zeros((1,), jnp.int32) + own
    key = _stored(_turned(k, row, one, (cos, sin)), stored[0].dtype, mode)
    value = _stored(_vectors(v, row, one), stored[0].dtype, mode)
    is_new = position < slots
    score = jnp.where(is_new, jnp.sum(queries * key[0], axis=1) * factor, FAR)
    mean = _mean(sums, score, value[0], is_new)
    _store(out, (row, 0, own * group + lax.iota(jnp.int32, MOST_QUERIES)), mean, width, group)

    @pl.when(is_new)
    def _() -> None:
        for i, (_, codes, scale) in enumerate((key, value)):
            _store(new[i], (*at, position + jnp.zeros((1,), jnp.int32)), codes, width, 1)
            if count > 2:
                new[2 + i][(*at, position)] = scale


def _sums(
    stored: Sequence[Ref],
    at: tuple[Any, Any, Any],
    queries: jax.Array,
    bounds: tuple[jax.Array, jax.Array],
    sizes: tuple[int, float],
) -> Sums:
    """Of the slots from the first to before the last of ``bounds``."""
    (start, stop), (tile, factor) = bounds, sizes
    width, power = stored[0].shape[-1], queries.shape[1]

    def load(ref: Ref, index: jax.Array) -> jax.Array:
        """A tile, zeros where slots aren't seen and past hd."""
        rows = index * tile + lax.broadcasted_iota(jnp.int32, (tile, power), 0)
        channels = lax.broadcasted_iota(jnp.int32, (tile, power), 1)
        mask = (rows >= start) & (rows < stop)
        mask = mask if power == width else mask & (channels < width)
        x = plgpu.load(ref.at[(*at, rows, channels)], mask=mask, other=jnp.zeros((), ref.dtype))
        return x.astype(queries.dtype)

    def add(index: jax.Array, sums: Sums) -> Sums:
        slots = index * tile + lax.iota(jnp.int32, tile)
        seen = (slots >= start) & (slots < stop)
        keys, values = load(stored[0], index), load(stored[1], index)
        scales = [
            plgpu.load(ref.at[(*at, slots)], mask=seen, other=jnp.float32(0)) for ref in stored[2:]
        ]
        scores = _contract(queries, keys, 1) * factor
        scores = scores * scales[0][None] if scales else scores
        scores = jnp.where(seen[None], scores, FAR)
        largest = jnp.maximum(sums.largest, jnp.max(scores, axis=1))
        weights = jnp.where(seen[None], jnp.exp2(scores - largest[:, None]), 0.0)
        shrink = jnp.exp2(sums.largest - largest)
        mix = weights * scales[1][None] if scales else weights
        near = mix.astype(queries.dtype)
        rest = (mix - near.astype(jnp.float32)).astype(queries.dtype)
        is_near = lax.broadcasted_iota(jnp.int32, mix.shape, 0) < MOST_QUERIES
        added = _contract(jnp.where(is_near, near, rest), values, 0)
        total = sums.weights * shrink + jnp.sum(weights, axis=1)
        return Sums(largest, total, sums.values * shrink[:, None] + added)

    none = Sums(
        jnp.full((ROWS,), FAR, jnp.float32),
        jnp.zeros((ROWS,), jnp.float32),
        jnp.zeros((ROWS, power), jnp.float32),
    )
    return lax.fori_loop(start // tile, pl.cdiv(stop, tile), add, none)


def _contract(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    dims = (((1,), (axis,)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _mean(sums: Sums, score: jax.Array, value: jax.Array, there: jax.Array) -> jax.Array:
    """The weighted mean [MOST_QUERIES, hd] of all values and the new token's, if it is there."""
    largest = jnp.maximum(sums.largest, score)
    shrink = jnp.exp2(sums.largest - largest)
    own = jnp.where(there, jnp.exp2(score - largest), 0.0)
    rows = lax.iota(jnp.int32, ROWS)
    values = sums.values * shrink[:, None]
    values = values + jnp.where(rows < MOST_QUERIES, own, 0.0)[:, None] * value
    mean = values / (sums.weights * shrink + own)[:, None]
    return jnp.sum(mean.reshape(2, MOST_QUERIES, mean.shape[1]), axis=0)


# ---- vectors of heads, up to a power of two -----------------------------------------------------


def _vectors(ref: Ref, row: Any, heads: jax.Array, order: jax.Array | None = None) -> jax.Array:
    """Float32 vectors of heads of [B, 1, H, hd], zeros past hd; channels in an order."""
    width = ref.shape[-1]
    shape = (heads.shape[0], 1 << (width - 1).bit_length())
    channels = lax.broadcasted_iota(jnp.int32, shape, 1)
    at = ref.at[
        row, 0, lax.broadcast_in_dim(heads, shape, (0,)), channels if order is None else order
    ]
    x = plgpu.load(at, mask=channels < width, other=jnp.zeros((), ref.dtype))
    return x.astype(jnp.float32)


def _turned(ref: Ref, row: Any, heads: jax.Array, turn: tuple[Ref, Ref]) -> jax.Array:
    """Heads turned by their position, each step in the dtype that ``xla.rotate`` has there."""
    width, dtype = ref.shape[-1], ref.dtype
    half = width // 2
    shape = (heads.shape[0], 1 << (width - 1).bit_length())
    channels = lax.broadcasted_iota(jnp.int32, shape, 1)
    is_first = channels < half
    angle = jnp.where(is_first, channels, channels - half)
    cos, sin = (
        plgpu.load(part.at[row, 0, angle], mask=channels < width, other=jnp.zeros((), part.dtype))
        for part in turn
    )
    other = jnp.where(is_first, channels + half, channels - half)
    across = _vectors(ref, row, heads, other).astype(dtype) * sin.astype(dtype)
    along = _vectors(ref, row, heads).astype(dtype) * cos.astype(dtype)
    return jnp.where(is_first, along - across, along + across).astype(jnp.float32)


def _stored(x: jax.Array, dtype: Any, mode: Mode) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A vector [1, hd] as the cache gives it back, float32; as it stores it; and int8's scale."""
    if dtype != jnp.int8:
        codes = x.astype(dtype)
        return codes.astype(jnp.float32), codes, jnp.ones((), jnp.float32)
    scale = jnp.max(jnp.abs(x)) * jnp.float32(1 / 127)
    inverse = jnp.where(scale > 0, 1.0 / jnp.where(scale > 0, scale, 1.0), 0.0)
    exact = x * inverse
    whole = jnp.rint(exact) if mode == "interpret" else (exact + _ROUNDER) - _ROUNDER
    rounded = jnp.clip(whole, -127.0, 127.0)
    return rounded * scale, rounded.astype(jnp.int8), scale


def _store(ref: Ref, place: tuple[Any, ...], x: jax.Array, width: int, count: int) -> None:
    """The first ``count`` of vectors at places, in the dtype of an array."""
    rows, channels = (lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1))
    *lead, vectors = place
    at = ref.at[(*lead, lax.broadcast_in_dim(vectors, x.shape, (0,)), channels)]
    plgpu.store(at, x.astype(ref.dtype), mask=(rows < count) & (channels < width))
