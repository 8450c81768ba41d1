"""Packed codes on the host: between the layouts of files and that of memory, numpy only.

In memory (``ternary2`` of ``fabric_kernels.packing``) the four codes of a byte are of consecutive
columns. transformers packs quarters of the rows: R = ceil(N / 4) rows of K bytes, and bits 2q, 2q+1
of byte [r, k] hold the code of row q·R + r, plus one. Either turns into the other by transposing
4x4 squares of two-bit fields, four bytes in one 32-bit word.
"""

import numpy as np
from fabric_kernels import packed_width
from jaxtyping import Float, Int8, Shaped, UInt8, UInt32

from fabric_jax.errors import FabricError

CODES_PER_BYTE = 4
BLOCK_BYTES = 1 << 18
"""Bytes converted at once: they and their copies stay in the caches."""
CODE_ZERO = 0b01010101
"""Four fields that hold code 0."""


def is_packed(packed: UInt8[np.ndarray, "..."]) -> bool:
    """Whether no field is 3, which stands for no code."""
    rows = packed.reshape(-1, packed.shape[-1]) if packed.size else packed.reshape(0, 1)
    step = max(1, BLOCK_BYTES // max(1, rows.shape[1]))
    blocks = (rows[start : start + step] for start in range(0, len(rows), step))
    # Both bits of a field are set in 3 alone.
    return not any((block & (block >> 1) & CODE_ZERO).any() for block in blocks)


def pack_codes(codes: Shaped[np.ndarray, "n k"]) -> UInt8[np.ndarray, "n k/4"]:
    """Packs codes of any number type, in memory's layout.

    Raises:
        FabricError: a value is not -1, 0 or 1.
    """
    n, k = codes.shape
    packed = np.empty((n, packed_width(k)), np.uint8)
    step = max(1, BLOCK_BYTES // max(1, k))
    for start in range(0, n, step):
        block = codes[start : start + step]
        with np.errstate(invalid="ignore"):
            small = block.astype(np.int8)
        if not np.array_equal(small, block) or np.abs(small).max(initial=0) > 1:
            raise FabricError("there are values that are no ternary codes", expected="-1, 0 or 1")
        fields = np.ones((len(block), packed.shape[1], CODES_PER_BYTE), np.uint8)
        fields.reshape(len(block), -1)[:, :k] = (small + 1).view(np.uint8)
        packed[start : start + step] = _join(fields)
    return packed


def unpack_codes(packed: UInt8[np.ndarray, "n k/4"], k: int) -> Int8[np.ndarray, "n k"]:
    """The inverse of :func:`pack_codes`: four times the bytes, for one matrix at a time."""
    fields = np.empty((*packed.shape, CODES_PER_BYTE), np.int8)
    for place in range(CODES_PER_BYTE):
        fields[..., place] = (packed >> np.uint8(2 * place)) & np.uint8(3)
    fields -= 1
    return fields.reshape(packed.shape[0], -1)[:, :k]


def dequantize(
    packed: UInt8[np.ndarray, "n k/4"], scale: float, k: int
) -> Float[np.ndarray, "n k"]:
    """``scale · codes`` in float32."""
    return unpack_codes(packed, k).astype(np.float32) * np.float32(scale)


def from_quarter_rows(quarters: UInt8[np.ndarray, "r k"], n: int) -> UInt8[np.ndarray, "n k/4"]:
    """From the layout of transformers, r = ceil(n / 4), to that of memory.

    Raises:
        FabricError: a field is 3.
    """
    r, k = quarters.shape
    packed = np.empty((n, packed_width(k)), np.uint8)
    step = max(1, BLOCK_BYTES // max(1, k))
    for start in range(0, r, step):
        words = _words(quarters[start : start + step])
        if (words & (words >> np.uint32(1)) & np.uint32(0x55555555)).any():
            raise FabricError("there are bytes that are no packed ternary codes")
        transpose_fields(words)
        for quarter in range(CODES_PER_BYTE):
            first = quarter * r + start
            count = min(len(words), n - first)
            if count > 0:
                packed[first : first + count] = words[:count]  # The low byte of each word.
            words >>= np.uint32(8)
    return packed


def to_quarter_rows(packed: UInt8[np.ndarray, "n k/4"], k: int) -> UInt8[np.ndarray, "r k"]:
    """From the layout of memory to that of transformers; rows past the last hold bits 0."""
    n = len(packed)
    r = -(-n // CODES_PER_BYTE)
    quarters = np.empty((r, k), np.uint8)
    step = max(1, BLOCK_BYTES // max(1, k))
    for start in range(0, r, step):
        count = min(step, r - start)
        words = np.zeros((count, packed.shape[1]), "<u4")
        for quarter in range(CODES_PER_BYTE):
            first = quarter * r + start
            rows = packed[first : min(first + count, n)]
            words[: len(rows)] |= rows.astype(np.uint32) << np.uint32(8 * quarter)
        transpose_fields(words)
        quarters[start : start + count] = words.view(np.uint8)[:, :k]
    return quarters


def _words(block: UInt8[np.ndarray, "b k"]) -> UInt32[np.ndarray, "b k/4"]:
    """A copy of rows as little-endian words, columns past the last filled with code 0."""
    b, k = block.shape
    words = np.empty((b, packed_width(k)), "<u4")
    columns = words.view(np.uint8)
    columns[:, :k] = block
    columns[:, k:] = CODE_ZERO
    return words


def transpose_fields(words: UInt32[np.ndarray, "b w"]) -> None:
    """Swaps field i of byte j with field j of byte i in each word, in place."""
    for shift, mask in ((6, 0x00CC00CC), (12, 0x0000F0F0)):
        swapped = words >> np.uint32(shift)
        swapped ^= words
        swapped &= np.uint32(mask)
        words ^= swapped
        swapped <<= np.uint32(shift)
        words ^= swapped


def _join(fields: UInt8[np.ndarray, "n w 4"]) -> UInt8[np.ndarray, "n w"]:
    joined = fields[..., 0].copy()
    for place in range(1, CODES_PER_BYTE):
        joined |= fields[..., place] << np.uint8(2 * place)
    return joined
