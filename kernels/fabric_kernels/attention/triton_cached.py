"""A Pallas-Triton kernel for a step of decoding: turns, stores and attends in one launch.

A program has a key/value head of a row with its queries, or one query, and of long caches a
stretch of the slots (Dao et al. 2023, "Flash-Decoding"); what the stretches give is put together
afterwards. The new key and value are used from registers, in the first stretch alone, and one
program stores them: no program reads what another one writes.
"""

from collections.abc import Callable, Sequence
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
from fabric_kernels.triton_programs import program_id

Ref = Any
Place = tuple[Any, ...]
"""The indices of a vector's first element."""
Halves = tuple[jax.Array, jax.Array]
"""Channels 0 to hd/2 and the rest, which rotary positions turn against each other."""

STRETCH = 1024
"""Slots of a program at most."""
TILE_ELEMENTS = 4096
"""Of keys at a time, and of values."""
FEW_HEADS = 132
"""Key/value heads of a batch below which each query head has a program of its own."""
LOG2_E = 1.4426950408889634
FAR = -1e30
_ROUNDER = 1.5 * 2**23
"""Added and taken away it rounds a float32 of at most 2^22, half to even; XLA leaves it out."""


@dataclass(frozen=True)
class Sums:
    """Of one query: the largest score, the weights' sum, and the weighted values, in halves."""

    largest: jax.Array
    weights: jax.Array
    values: Halves


jax.tree_util.register_dataclass(Sums, ["largest", "weights", "values"], [])


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

    Weights stay float32 where plain jax rounds them to the dtype of the values.
    """
    batch, _, heads, width = q.shape
    kv_heads, slots = cache.keys.shape[2:4]
    stretches = pl.cdiv(slots, STRETCH)
    stored = cache.arrays
    begin = jnp.zeros_like(positions) if first is None else first
    numbers = [layer.reshape(1), positions, begin]
    inputs = [q, k, v, *angles, *numbers]
    parts = [
        jax.ShapeDtypeStruct((batch, stretches, heads, width), jnp.float32),
        *[jax.ShapeDtypeStruct((batch, stretches, heads), jnp.float32)] * 2,
    ]
    if stretches == 1:
        parts = [jax.ShapeDtypeStruct((batch, 1, heads, width), q.dtype)]
    same = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in stored]
    outputs = pl.pallas_call(
        partial(
            _program,
            count=len(stored),
            whole=stretches == 1,
            factor=scale * LOG2_E,
            mode=mode,
        ),
        out_shape=[*same, *parts],
        grid=(kv_heads if batch * kv_heads >= FEW_HEADS else heads, batch, stretches),
        input_output_aliases={len(inputs) + i: i for i in range(len(stored))},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=mode == "interpret",
        name="cached_attention",
    )(*inputs, *stored)
    new = replace(cache, keys=outputs[0], values=outputs[1])
    if len(stored) > 2:
        new = replace(new, key_scales=outputs[2], value_scales=outputs[3])
    parts = outputs[len(stored) :]
    return (parts[0] if stretches == 1 else _together(*parts).astype(q.dtype)), new


def _together(values: jax.Array, largest: jax.Array, weights: jax.Array) -> jax.Array:
    """[B, 1, H, hd] of what the stretches [B, stretches, H] gave."""
    most = jnp.max(largest, axis=1, keepdims=True)
    shrink = jnp.exp2(largest - most)
    total = jnp.sum(shrink * weights, axis=1, keepdims=True)
    return jnp.sum(shrink[..., None] * values, axis=1, keepdims=True) / total[..., None]


def _program(*refs: Ref, count: int, whole: bool, factor: float, mode: Mode) -> None:
    q, k, v, cos, sin, layer, positions, first = refs[:8]
    stored, new = refs[8 : 8 + count], refs[8 + count : 8 + 2 * count]
    parts = refs[8 + 2 * count :]
    own, row, stretch = program_id(mode), pl.program_id(1), pl.program_id(2)
    (heads, width), slots = q.shape[2:], stored[0].shape[3]
    # Query heads from the first one on, as many as a program has.
    group = heads // pl.num_programs(0)
    step = DecodingStep(
        q=lambda head: (q, (row, 0, head, 0)),
        k=lambda head: (k, (row, 0, head, 0)),
        v=lambda head: (v, (row, 0, head, 0)),
        turn=(cos, sin),
        stored=stored,
        new=new,
        shared=heads // stored[0].shape[2],
        factor=factor,
    )
    bounds = (
        positions[row, 0],
        jnp.maximum(first[row, 0], stretch * STRETCH),
        jnp.minimum(slots, (stretch + 1) * STRETCH),
    )
    sums = attend_and_store(step, (layer[0], row, own * group), group, bounds, stretch == 0, mode)
    for i, one in enumerate(sums):
        place = (row, stretch, own * group + i)
        if whole:
            one = replace(one, values=mean_values(one))
        else:
            parts[1][place], parts[2][place] = one.largest, one.weights
        write_halves(parts[0], (*place, 0), one.values, width)


@dataclass(frozen=True, kw_only=True)
class DecodingStep:
    """What a step of decoding reads and writes, as references.

    Attributes:
        q: a query head's array and the place of its first channel.
        k: likewise of a key/value head.
        v: likewise.
        turn: cosine and sine [B, 1, hd/2].
        stored: keys and values [L, B, K, S, hd], and scales [L, B, K, S] of int8.
        new: the same, as they are written.
        shared: query heads of a key/value head.
        factor: on scores, for powers of two.
        tile_elements: of keys at a time.
    """

    q: Callable[[Any], tuple[Ref, Place]]
    k: Callable[[Any], tuple[Ref, Place]]
    v: Callable[[Any], tuple[Ref, Place]]
    turn: tuple[Ref, Ref]
    stored: Sequence[Ref]
    new: Sequence[Ref]
    shared: int
    factor: float
    tile_elements: int = TILE_ELEMENTS


def attend_and_store(
    step: DecodingStep,
    place: tuple[Any, Any, Any],
    group: int,
    bounds: tuple[jax.Array, jax.Array, jax.Array],
    has_new: Any,
    mode: Mode,
) -> list[Sums]:
    """The sums of some query heads of one key/value head; its new key and value are stored.

    Args:
        step: the arrays.
        place: layer, row, and the first of the query heads.
        group: how many of them.
        bounds: the token's position, and the slots from the first to before the last that are read.
        has_new: whether the token itself is among what is read, and stored, here.
        mode: what runs it.
    """
    layer, row, query = place
    position, start, end = bounds
    slots, width = step.stored[0].shape[3:]
    head = query // step.shared
    at = (layer, row, head)
    cos, sin = step.turn
    turn = (_half(cos, (row, 0, 0), 0, width), _half(sin, (row, 0, 0), 0, width))
    queries = [_turned(*step.q(query + i), turn, width) for i in range(group)]
    dtype = step.stored[0].dtype
    key = _stored(_turned(*step.k(head), turn, width), dtype, mode)
    value = _stored(_halves(*step.v(head), width), dtype, mode)

    stop = jnp.minimum(position, end)
    tile = max(16, step.tile_elements // (2 * _power(width // 2)))
    tiles = partial(_tile, step.stored, at, (start, stop), queries, (tile, width), step.factor)
    none = [_nothing(width) for _ in queries]
    sums = lax.fori_loop(start // tile, pl.cdiv(stop, tile), tiles, none)
    is_new = has_new & (position < slots)
    sums = [
        _add(one, jnp.where(is_new, _score(turned, key[0], step.factor), FAR), value[0], is_new)
        for one, turned in zip(sums, queries, strict=True)
    ]

    @pl.when(is_new & (query % step.shared == 0))
    def _() -> None:
        for i, (_, codes, scale) in enumerate((key, value)):
            write_halves(step.new[i], (*at, position, 0), codes, width)
            if len(step.stored) > 2:
                step.new[2 + i][(*at, position)] = scale

    return sums


def _tile(
    stored: Sequence[Ref],
    at: Place,
    bounds: tuple[jax.Array, jax.Array],
    queries: Sequence[Halves],
    sizes: tuple[int, int],
    factor: float,
    index: jax.Array,
    sums: list[Sums],
) -> list[Sums]:
    """The sums with a tile of slots added."""
    tile, width = sizes
    slots = index * tile + lax.iota(jnp.int32, tile)
    seen = (slots >= bounds[0]) & (slots < bounds[1])

    def load(i: int) -> Halves:
        first, second = (_rows(stored[i], at, slots, seen, half, width) for half in (0, 1))
        if len(stored) == 2:
            return first, second
        scales = plgpu.load(stored[2 + i].at[(*at, slots)], mask=seen, other=jnp.float32(0))
        return first * scales[:, None], second * scales[:, None]

    keys, values = load(0), load(1)
    found: list[Sums] = []
    for one, (first, second) in zip(sums, queries, strict=True):
        scores = jnp.sum(keys[0] * first[None] + keys[1] * second[None], axis=1) * factor
        scores = jnp.where(seen, scores, FAR)
        largest = jnp.maximum(one.largest, jnp.max(scores))
        weights = jnp.where(seen, jnp.exp2(scores - largest), 0.0)
        shrink = jnp.exp2(one.largest - largest)
        mix = partial(_mixed, shrink, weights)
        mixed = _each(mix, one.values, values)
        found.append(Sums(largest, one.weights * shrink + jnp.sum(weights), mixed))
    return found


def _add(one: Sums, score: jax.Array, value: Halves, there: jax.Array) -> Sums:
    """The sums with the new token, if it is there."""
    largest = jnp.maximum(one.largest, score)
    weight = jnp.where(there, jnp.exp2(score - largest), 0.0)
    shrink = jnp.exp2(one.largest - largest)
    values = _each(lambda own, x: own * shrink + weight * x, one.values, value)
    return Sums(largest, one.weights * shrink + weight, values)


def _mixed(shrink: jax.Array, weights: jax.Array, own: jax.Array, x: jax.Array) -> jax.Array:
    return own * shrink + jnp.sum(weights[:, None] * x, axis=0)


def mean_values(sums: Sums) -> Halves:
    """The weighted mean of the values."""
    return _each(lambda x: x / sums.weights, sums.values)


def _nothing(width: int) -> Sums:
    zeros = jnp.zeros((_power(width // 2),), jnp.float32)
    return Sums(jnp.float32(FAR), jnp.float32(0), (zeros, zeros))


def _score(query: Halves, key: Halves, factor: float) -> jax.Array:
    return jnp.sum(query[0] * key[0] + query[1] * key[1]) * factor


# ---- vectors of a head, in halves ---------------------------------------------------------------


def _each(call: Callable[..., jax.Array], *halves: Halves) -> Halves:
    """``call`` of the first halves, and of the second."""
    return call(*(one[0] for one in halves)), call(*(one[1] for one in halves))


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _half(ref: Ref, place: Place, half: int, width: int) -> jax.Array:
    """Float32 [a power of two], zeros past hd/2."""
    channels = lax.iota(jnp.int32, _power(width // 2))
    inside = channels < width // 2
    x = plgpu.load(
        ref.at[(*place[:-1], place[-1] + half * (width // 2) + channels)],
        mask=inside,
        other=jnp.zeros((), ref.dtype),
        # In a step through all layers another program has just stored it.
        volatile=True,
    )
    return x.astype(jnp.float32)


def _halves(ref: Ref, place: Place, width: int) -> Halves:
    return _half(ref, place, 0, width), _half(ref, place, 1, width)


def _rows(
    ref: Ref, at: Place, slots: jax.Array, seen: jax.Array, half: int, width: int
) -> jax.Array:
    """Float32 [tile, a power of two] of the slots, zeros where they aren't seen and past hd/2."""
    shape = (slots.shape[0], _power(width // 2))
    channels = lax.broadcasted_iota(jnp.int32, shape, 1)
    rows = lax.broadcast_in_dim(slots, shape, (0,))
    mask = lax.broadcast_in_dim(seen, shape, (0,)) & (channels < width // 2)
    x = plgpu.load(
        ref.at[(*at, rows, half * (width // 2) + channels)],
        mask=mask,
        other=jnp.zeros((), ref.dtype),
    )
    return x.astype(jnp.float32)


def _turned(ref: Ref, place: Place, turn: Halves, width: int) -> Halves:
    """A head turned by its position, each step in the dtype that ``xla.rotate`` has there."""
    cos, sin = (x.astype(ref.dtype) for x in turn)
    first, second = (x.astype(ref.dtype) for x in _halves(ref, place, width))
    turned = (first * cos - second * sin, second * cos + first * sin)
    return _each(_float32, turned)


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _rounded(x: jax.Array, mode: Mode) -> jax.Array:
    return jnp.rint(x) if mode == "interpret" else (x + _ROUNDER) - _ROUNDER


def _stored(x: Halves, dtype: Any, mode: Mode) -> tuple[Halves, Halves, jax.Array]:
    """A vector as the cache gives it back, float32; as it stores it; and int8's scale."""
    if dtype != jnp.int8:
        codes = _each(lambda half: half.astype(dtype), x)
        return _each(_float32, codes), codes, jnp.ones((), jnp.float32)
    largest = jnp.maximum(jnp.max(jnp.abs(x[0])), jnp.max(jnp.abs(x[1])))
    scale = largest * jnp.float32(1 / 127)
    inverse = jnp.where(scale > 0, 1.0 / jnp.where(scale > 0, scale, 1.0), 0.0)
    rounded = _each(lambda half: jnp.clip(_rounded(half * inverse, mode), -127.0, 127.0), x)
    codes = _each(lambda half: half.astype(jnp.int8), rounded)
    return _each(lambda half: half * scale, rounded), codes, scale


def write_halves(ref: Ref, place: Place, halves: Halves, width: int) -> None:
    """Stores a vector of so many channels in the dtype of an array."""
    for half, x in enumerate(halves):
        channels = lax.iota(jnp.int32, x.shape[0])
        plgpu.store(
            ref.at[(*place[:-1], place[-1] + half * (width // 2) + channels)],
            x.astype(ref.dtype),
            mask=channels < width // 2,
        )
