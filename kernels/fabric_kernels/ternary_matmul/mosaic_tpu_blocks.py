"""What the TPU kernels are compiled for, and the blocks that they read and write."""

from dataclasses import dataclass

from fabric_kernels.packing import CODES_PER_BYTE, DIGITS_PER_BYTE
from fabric_kernels.ternary_matmul.weight import TernaryWeight

LANES = 128
BLOCK_M = 256
BLOCKS_N = (512, 640, 384, 256)
"""Sizes to try: one that divides N spares a padded copy of the gradient."""
BLOCK_W = 1024
"""Packed bytes of a row. Larger blocks take fewer grid steps, smaller ones fit in VMEM."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a call is compiled for.

    Attributes:
        int8: the MXU multiplies int8.
        interpret: run in Pallas' interpreter, on any device.
    """

    int8: bool
    interpret: bool = False


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Blocks of a product of [M, K] with [N, W] bytes.

    Attributes:
        planes: codes in a byte, P.
        bm: rows in a block.
        bn: outputs in a block.
        bw: bytes in a block.
        mt: blocks of rows.
        nt: blocks of outputs.
        wt: blocks of bytes.
    """

    planes: int
    bm: int
    bn: int
    bw: int
    mt: int
    nt: int
    wt: int

    @property
    def width(self) -> int:
        """Columns of a plane, pads included."""
        return self.bw * self.wt


def tiling_of(m: int, weight: TernaryWeight) -> Tiling:
    """Even blocks of at most the sizes above; a last block may reach past the array."""
    n, width = weight.packed.shape[-2:]
    mt = -(-m // BLOCK_M)
    bm = m if mt == 1 else _round_up(-(-m // mt), 32)
    padded = _round_up(n, LANES)
    fitting = [bn for bn in BLOCKS_N if padded % bn == 0]
    bn = fitting[0] if fitting else min(padded, BLOCKS_N[0])
    wt = -(-width // BLOCK_W)
    bw = _round_up(-(-width // wt), LANES)
    planes = CODES_PER_BYTE if weight.packing == "ternary2" else DIGITS_PER_BYTE
    return Tiling(planes=planes, bm=bm, bn=bn, bw=bw, mt=mt, nt=-(-n // bn), wt=wt)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
