"""How the products of ``mosaic_gpu_planes`` are cut up."""

from dataclasses import dataclass, replace

from jax.experimental import pallas as pl

from fabric_kernels.packing import CODES_PER_BYTE
from fabric_kernels.ternary_matmul.mosaic_gpu_pipeline import (
    AT_ONCE,
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
TOKENS = (8, 16, 128, 144, 160, 176, 192, 256)
"""Of a block: of those that wgmma takes as columns of int8, these have been timed on an H200."""
IN_CLUSTERS, PARTS = 128, (2, 4)
"""Likewise of a block in a cluster, and of how many blocks."""


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

    def stages(self, itemsize: int) -> int:
        """Pipeline steps in shared memory, beside stores of values of that size."""
        other = SLOTS * store_tokens(self.stored, itemsize) * self.width * itemsize
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
    """Those that take the shortest time, counting the last round of the multiprocessors."""
    width = pl.cdiv(k, CODES_PER_BYTE)
    # Up to 128 tokens stay together: what is unpacked for them is unpacked once.
    least = next(tokens for tokens in TOKENS if tokens >= min(m, 128))
    alone = [Tiles(tokens) for tokens in TOKENS if tokens >= least]
    clusters = [Tiles(IN_CLUSTERS, parts=parts) for parts in PARTS if least <= IN_CLUSTERS]
    found = min(alone + clusters, key=lambda tiles: _nanoseconds(tiles, m, n, width))
    # Few tokens leave room for long steps, whose rows of weights are whole lines of memory.
    longest = 512 if found.tokens <= 16 else SWIZZLE
    whole = [codes for codes in (512, 256) if codes <= longest and width % (codes // 4) == 0]
    return replace(found, codes=max(whole, default=SWIZZLE))


def _nanoseconds(tiles: Tiles, m: int, n: int, width: int) -> float:
    """Of a product on an H200, but for its launch (jax 0.11.2, CUDA 13).

    128 codes of k take 2.5 for each token, as measured from 128 to 192 tokens, a little more with
    256, and at least what unpacking takes. A tile takes 3000 besides and the exchange in a cluster
    1500.
    """
    blocks = pl.cdiv(m, tiles.tokens) * pl.cdiv(n, tiles.width)
    step = max(150.0 + tiles.tokens, (2.7 if tiles.tokens > 208 else 2.5) * tiles.tokens)
    ends = 3000.0 + 1500.0 * (tiles.parts > 1)
    rounds = pl.cdiv(blocks, AT_ONCE[tiles.parts])
    return rounds * (tiles.steps(width) * step + ends)
