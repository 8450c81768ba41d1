"""How rows are cut for kernels that have them in registers whole (Triton).

A row is in pieces whose length is a power of two, so that 3072 channels don't cost what 4096 would.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

Ref = Any
Row = list[jax.Array]
"""The pieces [R, P] of some rows."""
MOST_PIECES = 3
THREAD = 8
"""Channels of a piece that a thread loads at once in half precision."""
MOST_HELD = 24
"""Channels of a thread in all pieces. On an H100 the gradient of 3072 gated channels took 0.4 ms
with 24 of 32768 rows, 10 ms with 48, which don't fit its registers."""


@dataclass(frozen=True)
class Pieces:
    """How rows are cut.

    Attributes:
        k: channels.
        size: of a piece, a power of two.
        rows: that a program has at once.
        warps: of a program.
    """

    k: int
    size: int
    rows: int
    warps: int

    def __iter__(self) -> Iterator[int]:
        """The first channel of each piece."""
        return iter(range(0, self.k, self.size))

    def load(self, ref: Ref, row: Any) -> Row:
        """Rows of an array [M, K], from one on."""
        return [self._load(ref.at[pl.ds(row, self.rows), pl.ds(s, self.size)], s) for s in self]

    def load_one(self, ref: Ref) -> Row:
        """An array [K], as pieces [1, P] in float32."""
        return [
            self._load(ref.at[pl.ds(s, self.size)], s, 1)[None, :].astype(jnp.float32) for s in self
        ]

    def store(self, ref: Ref, row: Any, values: Row) -> None:
        """The reverse of :meth:`load`."""
        for start, value in zip(self, values, strict=True):
            at = ref.at[pl.ds(row, value.shape[0]), pl.ds(start, self.size)]
            plgpu.store(at, value.astype(ref.dtype), mask=self._inside(value.shape, start))

    def _load(self, at: Ref, start: int, dims: int = 2) -> jax.Array:
        mask = self._inside((self.rows, self.size)[-dims:], start)
        return plgpu.load(at, mask=mask, other=None if mask is None else jnp.zeros((), at.dtype))

    def _inside(self, shape: tuple[int, ...], start: int) -> jax.Array | None:
        if start + self.size <= self.k:
            return None
        return start + lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) < self.k


def choose_pieces(m: int, k: int, threads: int) -> Pieces:
    """Whole pieces where there are few, one padded piece otherwise.

    ``threads`` of a program are what was fastest, more where a row needs them. A program has as
    many rows as give each thread ``THREAD`` channels of a piece, and ``m`` is a multiple of them.
    """
    size = k & -k
    if k > MOST_PIECES * size:
        size = 1 << (k - 1).bit_length()
    warps = threads // 32
    while -(-k // size) * size > 32 * warps * MOST_HELD:
        warps *= 2
    rows = warps // max(1, min(warps, size // (32 * THREAD)))
    while m % rows:
        rows //= 2
    return Pieces(k, size, rows, warps)


def wide(row: Row) -> Row:
    """In float32."""
    return [part.astype(jnp.float32) for part in row]


def sum_products(a: Row, b: Row) -> jax.Array:
    """The sums [R, 1] of products of all pieces."""
    sums = [jnp.sum(x * y, axis=1, keepdims=True) for x, y in zip(a, b, strict=True)]
    return over_pieces(jnp.add, sums)


def over_pieces(
    f: Callable[[jax.Array, jax.Array], jax.Array], parts: Sequence[jax.Array]
) -> jax.Array:
    """``f(f(first, second), third)`` and so on."""
    total = parts[0]
    for part in parts[1:]:
        total = f(total, part)
    return total
