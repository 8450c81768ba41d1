"""A Pallas-Triton kernel for a step of decoding of a batch: turns, stores, attends in one launch.

A program has a key/value head of a row with all of its queries, and reads the slots in use once:
for one query by plain arithmetic, for several on matrix units (``triton_batch_sums``).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from fabric_kernels.attention.cache import KVCache
from fabric_kernels.attention.triton_batch_sums import (
    FAR,
    MOST_QUERIES,
    ROWS,
    Slots,
    Sums,
    sums_of_one,
    sums_of_several,
)
from fabric_kernels.attention.triton_vectors import (
    store_vectors,
    stored_form,
    turned,
    vectors,
)
from fabric_kernels.triton_call import Mode
from fabric_kernels.triton_programs import program_id

Ref = Any
TILE_ELEMENTS = 1024
"""Of keys at a time, and of values, for one query."""
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Tile:
    """One program's work.

    Attributes:
        slots: at a time, at least 16.
        warps: of 32 threads.
        stages: of the pipeline of loads, on matrix units.
    """

    slots: int
    warps: int
    stages: int


def takes(q: jax.Array, cache: KVCache) -> bool:
    """Whether the kernel is for these: half precision, no more queries a head than it has rows."""
    stored = cache.keys.dtype
    known = q.dtype in (jnp.bfloat16, jnp.float16) and stored in (q.dtype, jnp.dtype(jnp.int8))
    return known and q.shape[2] <= MOST_QUERIES * cache.keys.shape[2]


def choose_tile(width: int, queries: int) -> Tile:
    """By hd, and the queries of a head; the fastest on an H200 of the sizes that were tried."""
    if queries > 1:
        return Tile(32, 4, 3)
    return Tile(max(16, TILE_ELEMENTS >> (width - 1).bit_length()), 2, 1)


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
    stored = cache.arrays
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
    own, row, out = program_id(mode), pl.program_id(1), refs[-1]
    (heads, width), capacity = q.shape[2:], stored[0].shape[3]
    group = heads // stored[0].shape[2]
    position, at = positions[row, 0], (layer[0], row, own)
    slots = Slots(
        stored=stored,
        at=at,
        start=first[0][row, 0] if first else jnp.int32(0),
        stop=jnp.minimum(position, capacity),
        tile=tile,
    )
    one = jnp.zeros((1,), jnp.int32) + own
    if group == 1:
        # Asked for first: what follows waits for loads of its own.
        begun = slots.load(slots.begin)
        queries = turned(q, row, one, (cos, sin))
        sums = sums_of_one(slots, begun, queries, factor)
    else:
        # Two rows of each query; those of others are the first one over again, and are not stored.
        numbers = lax.rem(lax.iota(jnp.int32, ROWS), jnp.int32(MOST_QUERIES))
        query = own * group + jnp.where(numbers < group, numbers, 0)
        queries = turned(q, row, query, (cos, sin))
        sums = sums_of_several(slots, queries.astype(q.dtype), factor)
    key = stored_form(turned(k, row, one, (cos, sin)), stored[0].dtype, mode)
    value = stored_form(vectors(v, row, one), stored[0].dtype, mode)
    is_new = position < capacity
    score = jnp.where(is_new, jnp.sum(queries * key[0], axis=1) * factor, FAR)
    mean = _mean(sums, score, value[0], is_new)
    place = own * group + lax.iota(jnp.int32, mean.shape[0])
    store_vectors(out, (row, 0, place), mean, width, group)

    @pl.when(is_new)
    def _() -> None:
        for i, (_, codes, scale) in enumerate((key, value)):
            place = position + jnp.zeros((1,), jnp.int32)
            store_vectors(new[i], (*at, place), codes, width, 1)
            if count > 2:
                new[2 + i][(*at, position)] = scale


def _mean(sums: Sums, score: jax.Array, value: jax.Array, there: jax.Array) -> jax.Array:
    """The weighted mean of all values and the new token's, if it is there.

    [1, hd] of one query; [MOST_QUERIES, hd] of several, whose two rows are added.
    """
    largest = jnp.maximum(sums.largest, score)
    shrink = jnp.exp2(sums.largest - largest)
    own = jnp.where(there, jnp.exp2(score - largest), 0.0)
    rows = lax.iota(jnp.int32, score.shape[0])
    values = sums.values * shrink[:, None]
    values = values + jnp.where(rows < MOST_QUERIES, own, 0.0)[:, None] * value
    mean = values / (sums.weights * shrink + own)[:, None]
    if mean.shape[0] == 1:
        return mean
    return jnp.sum(mean.reshape(2, MOST_QUERIES, mean.shape[1]), axis=0)
