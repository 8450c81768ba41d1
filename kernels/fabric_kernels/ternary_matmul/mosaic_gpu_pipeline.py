"""The ring of shared memory through which the Hopper kernels read, and what all of them set up."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

MULTIPROCESSORS = 132
"""Of an H100 SXM and an H200. Any number is correct: a block takes tiles until none are left."""
AT_ONCE = {1: MULTIPROCESSORS, 2: 64, 4: 24}
"""Clusters of so many blocks, one to a multiprocessor, that run at a time: their blocks are of one
part of the GPU. On an H200 64 of two and 20 of four did, 40 of three and 16 of eight did not."""
WARPGROUPS = 2
"""That compute; a third one copies."""
TILE_ROWS = 8
"""Of a swizzled tile of shared memory; what it is copied from or to has whole tiles."""
MOST_STORED = 208
"""Bytes of a row of outputs that are stored at a time, in as much shared memory."""
SLOTS = 2
"""Such stores under way."""
MEMORY_REGISTERS, COMPUTE_REGISTERS = 40, 232


@dataclass(frozen=True)
class Pipeline:
    """Shared memory of the steps under way, and the barriers of each.

    Attributes:
        packed: of weights, uint8 [stages, rows, bytes].
        rows: of the other operand, [stages, tokens, columns].
        full: one for each stage, where both copies arrive.
        empty: likewise, where the warpgroups that compute do.
        stages: their number.
    """

    packed: Any
    rows: Any
    full: Any
    empty: Any
    stages: int

    def slot(self, count: jax.Array) -> jax.Array:
        """Of the step of that number, counted over all tiles of a block."""
        return lax.rem(count, jnp.int32(self.stages))

    def fill(self, count: jax.Array, packed: Any, rows: Any) -> None:
        """Copies the step of that number, as soon as its place is free."""
        slot = self.slot(count)

        @pl.when(count >= self.stages)
        def _() -> None:
            plgpu.barrier_wait(self.empty.at[slot])

        plgpu.copy_gmem_to_smem(packed, self.packed.at[slot], self.full.at[slot])
        plgpu.copy_gmem_to_smem(rows, self.rows.at[slot], self.full.at[slot])


@dataclass(frozen=True)
class Blocks:
    """Tiles of an output [M, N'] among blocks.

    Attributes:
        shape: of the output.
        tokens: of a tile, along M.
        width: of a tile, along the other axis.
        parts: blocks of a cluster, each with a part of the sums of a tile.
    """

    shape: tuple[int, int]
    tokens: int
    width: int
    parts: int

    @property
    def columns(self) -> int:
        """Tiles along the second axis."""
        return pl.cdiv(self.shape[1], self.width)

    @property
    def count(self) -> int:
        """Tiles."""
        return pl.cdiv(self.shape[0], self.tokens) * self.columns

    @property
    def grid(self) -> dict[str, Any]:
        """Arguments of a kernel: a cluster has one tile, a block alone takes some in turn."""
        if self.parts == 1:
            return {"grid": (min(self.count, MULTIPROCESSORS),), "grid_names": ("block",)}
        cluster = {"cluster": (self.parts,), "cluster_names": ("part",)}
        return {"grid": (self.count,), "grid_names": ("block",), **cluster}

    @property
    def part(self) -> Any:
        """That of this block."""
        return lax.axis_index("part") if self.parts > 1 else 0

    def each(self, steps: int, run: Callable[..., None]) -> None:
        """Calls it with the number of each tile's first step, its first token, its column of tiles.

        ``steps`` are those of a tile.
        """
        block, columns = lax.axis_index("block"), jnp.int32(self.columns)

        def one(turn: jax.Array, index: jax.Array) -> None:
            # The second axis is the inner one: what blocks that run together read of the rows is
            # the same, and packed weights are small and stay in the L2 cache.
            token = lax.div(index, columns) * self.tokens
            run(turn * steps, token, lax.rem(index, columns))

        if self.parts > 1:
            one(jnp.int32(0), block)
            return
        together = min(self.count, MULTIPROCESSORS)
        turns = lax.div(self.count - 1 - block, together) + 1
        lax.fori_loop(0, turns, lambda i, _: one(i, block + i * together), None)


def store_tokens(tokens: int, itemsize: int) -> int:
    """Of so many, how many an epilogue stores at a time: each store waits for the warpgroup."""
    most = MOST_STORED // itemsize
    return next(some for some in range(tokens, 0, -8) if some <= most and tokens % some == 0)


def barriers(stages: int) -> list[Any]:
    """Those of a :class:`Pipeline`, full and empty."""
    return [
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    ]


def transforms(swizzle: int, itemsize: int) -> tuple[Any, ...]:
    """Of shared memory with swizzled rows of so many bytes."""
    return (
        plgpu.TilingTransform((TILE_ROWS, swizzle // itemsize)),
        plgpu.SwizzleTransform(swizzle),
    )
