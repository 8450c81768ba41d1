"""Softmax sums over the slots of a cache that one program reads, for one query or several.

For one query every row of a tile of slots keeps a maximum, a sum and weighted values of its own
until the end (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"): within the
loop nothing waits for another thread, and the next tile is on its way while one is added.

Several are on matrix units, whose tiles are copied ahead of the products. Sixteen rows are what
these take; a query has two of them. Its weights are float32: one row has them rounded to the dtype
of the values, the other what that leaves, and both are added at the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

Ref = Any
MOST_QUERIES = 8
"""Of a key/value head."""
ROWS = 2 * MOST_QUERIES
FAR = -1e30


@dataclass(frozen=True)
class Sums:
    """Of each row: the largest score, the weights' sum, and the weighted values [rows, hd]."""

    largest: jax.Array
    weights: jax.Array
    values: jax.Array


jax.tree_util.register_dataclass(Sums, ["largest", "weights", "values"], [])


def _nothing(rows: int, power: int) -> Sums:
    return Sums(
        jnp.full((rows,), FAR, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows, power), jnp.float32),
    )


@dataclass(frozen=True, kw_only=True)
class Slots:
    """What a program reads.

    Attributes:
        stored: keys and values [L, B, K, S, hd], and scales [L, B, K, S] of int8.
        at: layer, row and key/value head.
        start: the first slot.
        stop: the slot before which it ends.
        tile: slots at a time.
    """

    stored: Sequence[Ref]
    at: tuple[Any, Any, Any]
    start: jax.Array
    stop: jax.Array
    tile: int

    @property
    def power(self) -> int:
        """Channels, up to a power of two."""
        return 1 << (self.stored[0].shape[-1] - 1).bit_length()

    @property
    def begin(self) -> jax.Array:
        """The first tile."""
        return self.start // self.tile

    @property
    def end(self) -> jax.Array:
        """The tile before which they end."""
        return pl.cdiv(self.stop, self.tile)

    def seen(self, index: jax.Array) -> jax.Array:
        """Which slots of a tile are in use."""
        slots = index * self.tile + lax.iota(jnp.int32, self.tile)
        return (slots >= self.start) & (slots < self.stop)

    def load(self, index: jax.Array) -> list[jax.Array]:
        """A tile of each array, zeros where slots aren't seen and past hd."""
        shape, width = (self.tile, self.power), self.stored[0].shape[-1]
        rows = index * self.tile + lax.broadcasted_iota(jnp.int32, shape, 0)
        channels = lax.broadcasted_iota(jnp.int32, shape, 1)
        mask = (rows >= self.start) & (rows < self.stop)
        mask = mask if self.power == width else mask & (channels < width)
        found = [
            plgpu.load(
                ref.at[(*self.at, rows, channels)], mask=mask, other=jnp.zeros((), ref.dtype)
            )
            for ref in self.stored[:2]
        ]
        slots = index * self.tile + lax.iota(jnp.int32, self.tile)
        return found + [
            plgpu.load(ref.at[(*self.at, slots)], mask=self.seen(index), other=jnp.float32(0))
            for ref in self.stored[2:]
        ]


def sums_of_one(slots: Slots, begun: list[jax.Array], query: jax.Array, factor: float) -> Sums:
    """Of a query [1, hd]; ``begun`` is the first tile."""

    def add(index: jax.Array, carry: tuple[Sums, list[jax.Array]]) -> tuple[Sums, list[jax.Array]]:
        sums, (keys, values, *scales) = carry
        following, seen = slots.load(index + 1), slots.seen(index)
        scores = jnp.sum(keys.astype(jnp.float32) * query, axis=1) * factor
        scores = jnp.where(seen, scores * scales[0] if scales else scores, FAR)
        largest = jnp.maximum(sums.largest, scores)
        weights = jnp.where(seen, jnp.exp2(scores - largest), 0.0)
        shrink = jnp.exp2(sums.largest - largest)
        mix = weights * scales[1] if scales else weights
        added = sums.values * shrink[:, None] + mix[:, None] * values.astype(jnp.float32)
        return Sums(largest, sums.weights * shrink + weights, added), following

    start = (_nothing(slots.tile, slots.power), begun)
    rows = lax.fori_loop(slots.begin, slots.end, add, start)[0]
    largest = jnp.max(rows.largest)
    shrink = jnp.exp2(rows.largest - largest)
    none = jnp.zeros((1,), jnp.float32)
    total = none + jnp.sum(rows.weights * shrink)
    return Sums(none + largest, total, jnp.sum(rows.values * shrink[:, None], axis=0)[None])


def sums_of_several(slots: Slots, queries: jax.Array, factor: float) -> Sums:
    """Of [ROWS, hd]: each query is one of these rows, and the one ``MOST_QUERIES`` further."""

    def add(index: jax.Array, sums: Sums) -> Sums:
        keys, values, *scales = slots.load(index)
        seen = slots.seen(index)[None]
        scores = _contract(queries, keys.astype(queries.dtype), 1) * factor
        scores = jnp.where(seen, scores * scales[0][None] if scales else scores, FAR)
        largest = jnp.maximum(sums.largest, jnp.max(scores, axis=1))
        weights = jnp.where(seen, jnp.exp2(scores - largest[:, None]), 0.0)
        shrink = jnp.exp2(sums.largest - largest)
        mix = weights * scales[1][None] if scales else weights
        near = mix.astype(queries.dtype)
        rest = (mix - near.astype(jnp.float32)).astype(queries.dtype)
        is_near = lax.broadcasted_iota(jnp.int32, mix.shape, 0) < MOST_QUERIES
        added = _contract(jnp.where(is_near, near, rest), values.astype(queries.dtype), 0)
        total = sums.weights * shrink + jnp.sum(weights, axis=1)
        return Sums(largest, total, sums.values * shrink[:, None] + added)

    return lax.fori_loop(slots.begin, slots.end, add, _nothing(ROWS, slots.power))


def _contract(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    dims = (((1,), (axis,)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
