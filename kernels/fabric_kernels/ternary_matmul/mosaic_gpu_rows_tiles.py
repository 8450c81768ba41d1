"""How the products of ``mosaic_gpu_rows`` are cut up."""

from dataclasses import dataclass, replace

from jax.experimental import pallas as pl

from fabric_kernels.packing import CODES_PER_BYTE
from fabric_kernels.ternary_matmul import mosaic_gpu_share
from fabric_kernels.ternary_matmul.mosaic_gpu_pipeline import MULTIPROCESSORS

ROWS = 64
"""Outputs (rows of the first operand) of one wgmma."""
SWIZZLE = 128
"""Bytes of a swizzled row of shared memory: activation codes a wgmma call takes at least."""
PIECE_BYTES = SWIZZLE // CODES_PER_BYTE
"""Packed bytes that a wgmma call takes of a row."""
SHARED_BYTES = 208 << 10
"""Of the pipeline and the operands of an adapter; the epilogue stores from the rest."""
MOST_STAGES = 8


@dataclass(frozen=True)
class Tiles:
    """How a product is cut up.

    Attributes:
        tokens: of a block; a multiple of 64, at most 256.
        outputs: of a warpgroup; a multiple of 64.
        warpgroups: that compute; each has its own outputs and all share the tokens.
        codes: of k in a pipeline step; a multiple of 128.
        stages: pipeline steps in shared memory, beside what the epilogue stores from.
        store: tokens that the epilogue stores at a time.
        slots: such stores in shared memory, of four bytes an output; twice as many of two bytes.
    """

    tokens: int
    outputs: int = ROWS
    warpgroups: int = 2
    codes: int = 256
    stages: int = 3
    store: int = 64
    slots: int = 1

    @property
    def width(self) -> int:
        """Outputs of a block."""
        return self.outputs * self.warpgroups

    @property
    def bytes(self) -> int:
        """Packed bytes of a row in a step."""
        return self.codes // CODES_PER_BYTE

    def beside_share(self) -> "Tiles":
        """Tiles that leave shared memory to the operands of an adapter: shorter steps."""
        codes = SWIZZLE
        step = codes * self.tokens + codes // CODES_PER_BYTE * self.width
        left = SHARED_BYTES - mosaic_gpu_share.scratch_bytes(
            self.warpgroups, self.tokens, self.outputs
        )
        stages = min(MOST_STAGES, left // step)
        return replace(self, codes=codes, stages=stages)


def choose_tiles(m: int, n: int) -> Tiles:
    """The largest tiles that still give nearly every multiprocessor one.

    Many tokens to a block share the work of unpacking: of the tiles measured on an H100, the first
    were the fastest at 1024 and 8192 tokens, the last at 128 (jax 0.11.2, CUDA 13).
    """
    for tiles in (Tiles(256, stages=3, store=16), Tiles(128, stages=4)):
        if pl.cdiv(m, tiles.tokens) * pl.cdiv(n, tiles.width) >= MULTIPROCESSORS * 3 // 4:
            return tiles
    return Tiles(64, warpgroups=1, stages=8)
