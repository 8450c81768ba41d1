"""Ternary block formats and the layout ``ternary2``, each directly into the other.

All of them hold codes + 1. TQ1_0 and TQ2_0 have blocks of 256 weights of a row, each with a float16
``d`` that multiplies its codes; I2_S has one scale for the tensor (ggml-quants.c, bitnet.cpp's
ggml-bitnet-mad.cpp). Work goes by blocks of rows that fit a processor's cache.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, UInt8
from numpy.typing import NDArray

from fabric_jax.checkpoints.source import TernaryMatrix
from fabric_jax.checkpoints.ternary import CODE_ZERO, transpose_fields, unpack_codes
from fabric_jax.errors import FabricError

BLOCK = 256
TQ1_BYTES, TQ2_BYTES = 54, 66
CHUNK_WEIGHTS = 1 << 20

EMPTY_SCALE = 1e-5
"""Scale of a matrix without a non-zero code: the smallest that absmean gives."""

_PLACES = np.array([81, 27, 9, 3, 1], np.uint8)
# Five trits as a number v < 243 are stored as the byte whose product with 3^n has trit n on top.
_TRITS_TO_BYTE = ((np.arange(243) * 256 + 242) // 243).astype(np.uint8)


def decode_tq2(data: UInt8[np.ndarray, "n bytes"], what: str) -> TernaryMatrix:
    """A TQ2_0 tensor; ``what`` names it in messages.

    Byte ``32h + m`` of a block holds the codes 128h + 32l + m, l = 0..3, least significant first.

    Raises:
        FabricError: a code is 3, or the scales are not those of one ternary matrix.
    """
    return _decode(data, TQ2_BYTES, slice(64, 66), _tq2_codes, what)


def decode_tq1(data: UInt8[np.ndarray, "n bytes"], what: str) -> TernaryMatrix:
    """A TQ1_0 tensor: five codes a byte for the first 240 of a block, four for the last 16.

    Raises:
        FabricError: the scales are not those of one ternary matrix.
    """
    return _decode(data, TQ1_BYTES, slice(52, 54), _tq1_codes, what)


def encode_tq2(matrix: TernaryMatrix, what: str) -> UInt8[np.ndarray, "n bytes"]:
    """The bytes that ggml's quantiser gives for codes times scale.

    Raises:
        FabricError: the scale is none in float16.
    """
    return _encode(matrix, TQ2_BYTES, _tq2_bytes, what)


def encode_tq1(matrix: TernaryMatrix, what: str) -> UInt8[np.ndarray, "n bytes"]:
    """The bytes that ggml's quantiser gives for codes times scale.

    Raises:
        FabricError: the scale is none in float16.
    """
    return _encode(matrix, TQ1_BYTES, _tq1_bytes, what)


def decode_i2s(data: UInt8[np.ndarray, " bytes"], n: int, k: int, what: str) -> TernaryMatrix:
    """An I2_S tensor in the classic layout, which knows no rows.

    Byte m of 32 holds the codes m, 32 + m, 64 + m, 96 + m of 128, most significant first; a float32
    scale follows the last. Builds of bitnet.cpp since 2026 may interleave rows instead, by the
    processor they were built for; the bytes don't tell.

    Raises:
        FabricError: a code is 3, the scale is no positive number, or K is not divisible by 4.
    """
    if k % 4:
        raise FabricError(f"{what} has rows that don't end with a byte", found=f"K = {k}")
    count = n * k // 4
    packed = np.empty(count, np.uint8)
    codes_bytes = data[:count]
    for start in range(0, count, CHUNK_WEIGHTS // 4):
        part = codes_bytes[start : start + CHUNK_WEIGHTS // 4]
        _require_codes(part, what)
        words = part.copy().view("<u4")
        transpose_fields(words)
        codes = words.view(np.uint8).reshape(-1, 8, 4)[..., ::-1].swapaxes(-1, -2)
        packed[start : start + part.size] = codes.reshape(-1)
    scale = float(data[count : count + 4].view("<f4")[0])
    if not (np.isfinite(scale) and scale > 0):
        raise FabricError(f"{what} has a scale that is no positive number", found=str(scale))
    return TernaryMatrix(packed=packed.reshape(n, k // 4), scale=scale, k=k)


def one_scale(d: Float32[np.ndarray, " ..."], what: str) -> float:
    """The scale of a matrix from the ``d`` of its blocks: the only one that is not zero.

    Raises:
        FabricError: they differ, as those of quantised Gaussian weights do, or are no numbers.
    """
    if not np.isfinite(d).all():
        raise FabricError(f"{what} has scales that are not finite")
    used = np.unique(d[d != 0])
    if not used.size:
        return EMPTY_SCALE
    if used.size > 1 or used[0] < 0:
        raise FabricError(
            f"{what} holds no weights of a BitNet: one scale multiplies each of its matrices",
            expected="one positive scale in all blocks",
            found=f"{used.size} different ones from {used[0]:g} to {used[-1]:g}",
            fix="The file was quantised from weights that are not ternary; use its 16-bit original",
        )
    return float(used[0])


def half_scale(scale: float, what: str) -> np.float16:
    """A scale as blocks store it.

    Raises:
        FabricError: it is none in float16, which ends at 65504 and 6e-8.
    """
    with np.errstate(over="ignore"):
        half = np.float16(np.float32(scale))
    if not np.isfinite(half) or half <= 0:
        raise FabricError(f"the scale {scale:g} of {what} is not representable in float16")
    return half


def rows_a_chunk(k: int) -> int:
    """Rows of K weights that are worked on at a time."""
    return max(1, CHUNK_WEIGHTS // k)


def _decode(
    data: NDArray[np.uint8],
    size: int,
    scale_bytes: slice,
    codes_of: Callable[[NDArray[np.uint8], str], NDArray[np.uint8]],
    what: str,
) -> TernaryMatrix:
    n, k = len(data), data.shape[1] // size * BLOCK
    packed = np.empty((n, k // 4), np.uint8)
    d = data.reshape(n, -1, size)[..., scale_bytes]
    scales = np.ascontiguousarray(d).view("<f2")[..., 0].astype(np.float32)
    step = rows_a_chunk(k)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        blocks = data[rows].reshape(-1, size)
        codes = codes_of(blocks, what)
        # Whatever its codes are, a block without a scale is zeros.
        codes[scales[rows].reshape(-1) == 0] = CODE_ZERO
        packed[rows] = codes.reshape(-1, k // 4)
    return TernaryMatrix(packed=packed, scale=one_scale(scales, what), k=k)


def _encode(
    matrix: TernaryMatrix,
    size: int,
    bytes_of: Callable[[NDArray[np.uint8]], NDArray[np.uint8]],
    what: str,
) -> NDArray[np.uint8]:
    n, k = len(matrix.packed), matrix.k
    if k % BLOCK:
        raise ValueError(f"rows of {k} weights don't divide into blocks of {BLOCK}")
    d = np.frombuffer(half_scale(matrix.scale, what).astype("<f2").tobytes(), np.uint8)
    out = np.empty((n, k // BLOCK, size), np.uint8)
    step = rows_a_chunk(k)
    for start in range(0, n, step):
        blocks = matrix.packed[start : start + step].reshape(-1, BLOCK // 4)
        part = out[start : start + step].reshape(-1, size)
        part[:, :-2] = bytes_of(blocks)
        part[:, -2:] = d
        part[(blocks == CODE_ZERO).all(1), -2:] = 0
    return out.reshape(n, -1)


def _tq2_codes(blocks: NDArray[np.uint8], what: str) -> NDArray[np.uint8]:
    """[blocks, 66] to packed codes [blocks, 64]."""
    stored = blocks[:, :64].copy()
    _require_codes(stored, what)
    words = stored.view("<u4")
    transpose_fields(words)
    squares = words.view(np.uint8).reshape(-1, 2, 8, 4)
    return np.ascontiguousarray(squares.swapaxes(-1, -2)).reshape(-1, 64)


def _tq2_bytes(blocks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Packed codes [blocks, 64] to the stored ones."""
    squares = blocks.reshape(-1, 2, 4, 8).swapaxes(-1, -2).copy()
    words = squares.view("<u4")
    transpose_fields(words)
    return words.view(np.uint8).reshape(-1, 64)


def _tq1_codes(blocks: NDArray[np.uint8], what: str) -> NDArray[np.uint8]:
    """[blocks, 54] to packed codes [blocks, 64]."""
    del what
    codes = np.empty((len(blocks), BLOCK), np.uint8)
    start = 0
    for stored, trits in ((slice(0, 32), 5), (slice(32, 48), 5), (slice(48, 52), 4)):
        part = blocks[:, stored].copy()
        width = part.shape[1]
        for _ in range(trits):
            # The top trit, (byte · 3) >> 8, in comparisons that run on bytes.
            code = (part >= 86).view(np.uint8) + (part >= 171).view(np.uint8)
            codes[:, start : start + width] = code
            part *= np.uint8(3)
            start += width
    # The product brings field f, at bit 8f, to bit 24 + 2f; nothing else reaches that far.
    return ((codes.view("<u4") * np.uint32(0x01041040)) >> np.uint32(24)).astype(np.uint8)


def _tq1_bytes(blocks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Packed codes [blocks, 64] to the stored bytes [blocks, 52]."""
    codes = (unpack_codes(blocks, BLOCK) + 1).view(np.uint8)
    out = np.empty((len(blocks), 52), np.uint8)
    start = 0
    for stored, trits in ((slice(0, 32), 5), (slice(32, 48), 5), (slice(48, 52), 4)):
        width = stored.stop - stored.start
        part = codes[:, start : start + trits * width].reshape(-1, trits, width)
        number = (part * _PLACES[:trits, None]).sum(1, dtype=np.uint8)
        out[:, stored] = _TRITS_TO_BYTE[number]
        start += trits * width
    return out


def _require_codes(stored: NDArray[np.uint8], what: str) -> None:
    """Of the four values of a field 3 stands for no code; both its bits are set."""
    if (stored & (stored >> 1) & 0x55).any():
        raise FabricError(
            f"{what} has bytes that are no ternary codes", fix="The file is damaged; get it again"
        )
