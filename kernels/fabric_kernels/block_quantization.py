"""Tables of integers: int8 or int4 codes, and one float16 scale for each 32 of a row.

    value[n, k] = code[n, k] * scale[n, k // 32]

A row of K = 70 values has three groups, the last one short::

    values   0 ............ 31 | 32 ........... 63 | 64 .. 69
    scales        s0           |        s1         |   s2        float16, ceil(K / 32) of them

    int8     one byte a code, -127..127: K bytes
    int4     two codes a byte, each plus 8 (0..15): ceil(K / 2) bytes

             bit    7 6 5 4   3 2 1 0
             byte j [ 2j+1 ]  [ 2j   ]        an odd K leaves code 0 (bits 1000) in the last

The rounding is GGUF's: int8 is Q8_0 (scale = absmax / 127, halves away from zero), int4 is Q4_0
(scale = the value of largest magnitude, with its sign, / -8). Codes and scales are those of
``gguf.quants``; only the order of Q4_0's nibbles is another one there (j and j + 16 share a byte).
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax
from jax.typing import DTypeLike

GROUP = 32
"""Values that share a scale."""
ZERO4 = 8
"""Of the 16 values of an int4 field, the one that stands for 0."""

TableBits = Literal[8, 4]


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scales"], meta_fields=["k"])
@dataclass(frozen=True)
class BlockTable:
    """What stands for a frozen table [..., N, K].

    Attributes:
        codes: int8 [..., N, K], or uint8 [..., N, ceil(K / 2)] for int4.
        scales: float16 [..., N, ceil(K / 32)].
        k: K.
    """

    codes: jax.Array
    scales: jax.Array
    k: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values, [..., N, K]."""
        return (*self.codes.shape[:-1], self.k)

    @property
    def bits(self) -> TableBits:
        """Of a code."""
        return 8 if self.codes.dtype == np.int8 else 4

    def check(self) -> None:
        """Raises TypeError or ValueError where dtypes or shapes don't fit."""
        if self.codes.dtype.name not in ("int8", "uint8") or self.scales.dtype != np.float16:
            raise TypeError(
                "a quantised table has int8 or uint8 codes and float16 scales, "
                f"found {self.codes.dtype} and {self.scales.dtype}"
            )
        rows = self.codes.shape[:-1]
        codes, scales = (*rows, code_bytes(self.k, self.bits)), (*rows, groups(self.k))
        if self.codes.shape != codes or self.scales.shape != scales:
            raise ValueError(
                f"a quantised table of {self.k} columns has codes {list(codes)} and scales "
                f"{list(scales)}, found {list(self.codes.shape)} and {list(self.scales.shape)}"
            )

    def rows(self, indices: jax.Array) -> "BlockTable":
        """The rows of a table [N, K] at int32 [...], still as codes: [..., K]."""
        return BlockTable(self.codes[indices], self.scales[indices], self.k)


def code_bytes(k: int, bits: TableBits) -> int:
    """Bytes of a row's codes."""
    return k if bits == 8 else -(-k // 2)


def groups(k: int) -> int:
    """Scales of a row."""
    return -(-k // GROUP)


def table_bytes(n: int, k: int, bits: TableBits) -> int:
    """Bytes of a table [n, k]: codes and scales."""
    return n * (code_bytes(k, bits) + 2 * groups(k))


def quantize_blocks(
    x: npt.ArrayLike, bits: TableBits
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float16]]:
    """Codes and scales of floats [..., K], on the host, as ``gguf.quants`` makes them.

    Not through XLA, which turns the division by a constant into a product with its rounded inverse.

    Args:
        x: floats; taken as float32.
        bits: 8 or 4.

    Returns:
        The ``codes`` and ``scales`` of a :class:`BlockTable`.
    """
    values = np.asarray(x, np.float32)
    k = values.shape[-1]
    pad = [(0, 0)] * (values.ndim - 1) + [(0, -k % GROUP)]
    blocks = np.pad(values, pad).reshape(*values.shape[:-1], groups(k), GROUP)
    if bits == 8:
        scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    else:
        largest = np.abs(blocks).argmax(-1, keepdims=True)
        scale = np.take_along_axis(blocks, largest, -1) / np.float32(-8)
    # The inverse of a subnormal may be infinite; float16 holds no such scale anyhow.
    usable = np.abs(scale) >= np.finfo(np.float32).tiny
    scaled = blocks * np.where(usable, 1 / np.where(usable, scale, 1), 0).astype(np.float32)
    if bits == 8:
        size = np.abs(scaled)
        whole = np.floor(size)
        codes = np.sign(scaled) * (whole + np.floor(2 * (size - whole)))
        codes = codes.astype(np.int8).reshape(*values.shape[:-1], -1)[..., :k]
    else:
        codes = np.trunc(scaled + np.float32(ZERO4 + 0.5)).clip(0, 15).astype(np.uint8)
        # The values that fill the last group are 0 and have the code of 0.
        codes = codes.reshape(*values.shape[:-1], -1)[..., : 2 * code_bytes(k, 4)]
        codes = codes[..., 0::2] | codes[..., 1::2] << np.uint8(4)
    return codes, scale[..., 0].astype(np.float16)


def dequantize_blocks(table: BlockTable, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """The values [..., K] of codes and scales, each product exact in float32 and then cast."""
    k = table.k
    codes = table.codes
    if table.bits == 4:
        # Shifts of a broadcast byte: XLA on CPU joins two halves element by element, which is slow.
        pairs = (*codes.shape, 2)
        shifts = jnp.uint8(4) * lax.broadcasted_iota(jnp.uint8, pairs, codes.ndim)
        fields = jnp.broadcast_to(codes[..., None], pairs) >> shifts & jnp.uint8(15)
        codes = fields.reshape(*codes.shape[:-1], -1)[..., :k].astype(jnp.int8) - jnp.int8(ZERO4)
    pad = [(0, 0)] * (codes.ndim - 1) + [(0, -k % GROUP)]
    blocks = jnp.pad(codes, pad).reshape(*codes.shape[:-1], groups(k), GROUP)
    values = blocks.astype(jnp.float32) * table.scales[..., None].astype(jnp.float32)
    return values.reshape(*codes.shape[:-1], -1)[..., :k].astype(dtype)


def no_gradient(table: BlockTable) -> BlockTable:
    """The cotangent of a frozen table."""
    codes: Any = np.zeros(table.codes.shape, jax.dtypes.float0)
    return BlockTable(codes, jnp.zeros_like(table.scales), table.k)
