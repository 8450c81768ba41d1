"""How the products of ``mosaic_gpu`` are cut up."""

from dataclasses import dataclass

from jax.experimental import pallas as pl

from fabric_kernels.packing import CODES_PER_BYTE
from fabric_kernels.ternary_matmul.mosaic_gpu_pipeline import (
    MULTIPROCESSORS,
    SLOTS,
    WARPGROUPS,
    store_tokens,
)

ROWS = 64
"""Outputs (rows of the first operand) of one wgmma."""
SWIZZLE = 128
"""Bytes of a swizzled row of shared memory: activation codes a wgmma call takes at least."""
PIECE_BYTES = SWIZZLE // CODES_PER_BYTE
"""Packed bytes that a wgmma call takes of a row."""
SHARED_BYTES = 224 << 10
"""Of the pipeline, and what the epilogue keeps; barriers have the rest."""
MOST_STAGES = 8


@dataclass(frozen=True)
class Tiles:
    """How a product is cut up.

    Attributes:
        tokens: of a block; a multiple of 16, or 8 or 24, at most 256.
        outputs: of a warpgroup; a multiple of 64. Two warpgroups share the tokens.
        codes: of k in a pipeline step; a multiple of 128.
        parts: blocks of a cluster among which k is divided. Each then stores a part of the
            tokens, a multiple of 8 of them.
    """

    tokens: int
    outputs: int = ROWS
    codes: int = SWIZZLE
    parts: int = 1

    @property
    def width(self) -> int:
        """Outputs of a block."""
        return self.outputs * WARPGROUPS

    @property
    def bytes(self) -> int:
        """Packed bytes of a row in a step."""
        return self.codes // CODES_PER_BYTE

    @property
    def stored(self) -> int:
        """Tokens that a block of a cluster stores."""
        return self.tokens // self.parts

    def stages(self, itemsize: int, other: int = 0) -> int:
        """Pipeline steps in shared memory, beside stores of that size and ``other`` bytes."""
        other += SLOTS * store_tokens(self.stored, itemsize) * self.width * itemsize
        if self.parts > 1:
            other += 4 * self.tokens * self.width
        step = self.codes * self.tokens + self.bytes * self.width
        stages = min(MOST_STAGES, (SHARED_BYTES - other) // step)
        assert stages > 1, "the place of a step gets free when the next one has been read"
        return stages

    def steps(self, width: int) -> int:
        """Of a block, for rows of that many packed bytes."""
        return pl.cdiv(pl.cdiv(width, self.bytes), self.parts)


def choose_tiles(m: int, n: int, k: int) -> Tiles:
    """Placeholder."""
    for t in (256, 128):
        if m >= t and pl.cdiv(m, t) * pl.cdiv(n, 128) >= MULTIPROCESSORS * 3 // 4:
            return Tiles(t)
    return Tiles(64)
