"""Byte layouts of packed ternary weights.

A *code* is -1, 0 or +1. A matrix of codes has shape [N, K]: N outputs, K inputs (the contracted
axis). Both layouts keep K on the last axis, so that both operands of the matmul are contracted on
their last axis (the fast form of integer dots) and rows can be sharded freely.

``ternary2`` (2 bits a weight)::

    packed uint8 [N, ceil(K / 4)]

    byte i of a row      bit 7 6   5 4   3 2   1 0
    holds code of k =        4i+3  4i+2  4i+1  4i

A field stores code + 1, so 0, 1, 2 stand for -1, 0, +1 and 3 never occurs. The tail of a row whose
K is not divisible by 4 is filled with code 0. Least significant bits first makes the layout equal
to a bit-cast of the byte to ``uint2[4]``.

``ternary1.6`` (8/5 bits a weight)::

    packed uint8 [N, W], W = ceil(K / 5)

    byte i of a row holds the codes of k = i, W + i, 2W + i, 3W + i, 4W + i

as five digits t = code + 1 of a number in base 3, the first the most significant,
``v = 81 t0 + 27 t1 + 9 t2 + 3 t3 + t4``, stored as the fraction ``ceil(256 v / 243)``. Digit j is
then the carry of ``3 (b · 3^j mod 256)`` past 256: no division, and bytes are those of GGUF's
TQ1_0. Each digit's codes are contiguous in k, so unpacking needs no interleaving. Codes past K are
0.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Int8, UInt8

Packing = Literal["ternary2", "ternary1.6"]

CODES_PER_BYTE = 4
"""Of ``ternary2``."""
DIGITS_PER_BYTE = 5
"""Of ``ternary1.6``."""
REPACK_CODES = 1 << 22
"""Codes that are out of either layout at a time while a matrix is re-packed."""


def packed_width(k: int, packing: Packing = "ternary2") -> int:
    """Bytes in a row of ``k`` codes."""
    return -(-k // _codes_per_byte(packing))


def bits_per_weight(n: int, k: int, scale_bits: int = 32, packing: Packing = "ternary2") -> float:
    """Stored bits a weight of an [n, k] matrix, its one scale and every pad bit counted."""
    return (8 * n * packed_width(k, packing) + scale_bits) / (n * k)


def pack(codes: Int8[Array, "*stack n k"], packing: Packing) -> UInt8[Array, "*stack n w"]:
    """Packs codes in {-1, 0, 1} along the last axis.

    Codes outside that range are a caller's error and are not looked for: under ``jit`` values can't
    be tested. Readers of files validate before they call this.
    """
    _codes_per_byte(packing)
    return pack_ternary2(codes) if packing == "ternary2" else _pack_ternary1_6(codes)


def unpack(
    packed: UInt8[Array, "*stack n w"], k: int, packing: Packing, dtype: DTypeLike = jnp.int8
) -> jax.Array:
    """Unpacks to codes of ``dtype``, shape [*stack, n, k]."""
    _check_width(packed, k, packing)
    if packing == "ternary2":
        return unpack_ternary2(packed, k, dtype)
    digits = [(_leading_fraction(packed, j) * 3) >> 8 for j in range(DIGITS_PER_BYTE)]
    codes = jnp.concatenate([digit.astype(dtype) for digit in digits], axis=-1)
    return (codes - jnp.asarray(1, dtype))[..., :k]


def repack(
    packed: UInt8[Array, "*stack n v"], k: int, source: Packing, to: Packing
) -> UInt8[Array, "*stack n w"]:
    """The same codes in another layout, bit for bit what packing them at once gives.

    A block of rows at a time: scratch is some bytes for each of ``REPACK_CODES`` codes, however
    large the matrix.
    """
    _check_width(packed, k, source)
    width = packed_width(k, to)
    if source == to:
        return packed
    rows = packed.reshape(-1, packed.shape[-1])
    count = rows.shape[0]
    block = min(count, max(1, REPACK_CODES // max(1, k)))
    if block == count:
        return pack(unpack(packed, k, source), to)

    def write(index: jax.Array, out: jax.Array) -> jax.Array:
        # The last block ends with the last row; rows that two blocks share come out twice alike.
        start = jnp.minimum(index * block, count - block)
        part = lax.dynamic_slice_in_dim(rows, start, block)
        part = pack(unpack(part, k, source), to)
        return lax.dynamic_update_slice_in_dim(out, part, start, 0)

    empty = jnp.zeros((count, width), jnp.uint8)
    done = lax.fori_loop(0, -(-count // block), write, empty)
    return done.reshape(*packed.shape[:-1], width)


def pack_ternary2(codes: Int8[Array, "*stack n k"]) -> UInt8[Array, "*stack n k/4"]:
    """Packs codes in {-1, 0, 1}, four a byte along the last axis."""
    k = codes.shape[-1]
    pad = packed_width(k) * CODES_PER_BYTE - k
    fields = (codes.astype(jnp.int8) + 1).astype(jnp.uint8)
    fields = jnp.pad(fields, [(0, 0)] * (codes.ndim - 1) + [(0, pad)], constant_values=1)
    fields = fields.reshape(*codes.shape[:-1], packed_width(k), CODES_PER_BYTE)
    return jnp.sum(fields << _shifts(fields.ndim), axis=-1, dtype=jnp.uint8)


def unpack_ternary2(
    packed: UInt8[Array, "*stack n k/4"], k: int, dtype: DTypeLike = jnp.int8
) -> jax.Array:
    """Unpacks to codes of ``dtype``, shape [*stack, n, k]."""
    if packed.shape[-1] != packed_width(k):
        raise ValueError(
            f"packed rows of {k} ternary weights have {packed_width(k)} bytes, "
            f"found {packed.shape[-1]}"
        )
    fields = (packed[..., None] >> _shifts(packed.ndim + 1)) & jnp.uint8(3)
    fields = fields.reshape(*packed.shape[:-1], CODES_PER_BYTE * packed.shape[-1])
    return (fields.astype(dtype) - jnp.asarray(1, dtype))[..., :k]


def _pack_ternary1_6(codes: jax.Array) -> jax.Array:
    width = packed_width(codes.shape[-1], "ternary1.6")
    pad = width * DIGITS_PER_BYTE - codes.shape[-1]
    digits = codes.astype(jnp.uint16) + jnp.uint16(1)  # -1 wraps around to 0
    digits = jnp.pad(digits, [(0, 0)] * (codes.ndim - 1) + [(0, pad)], constant_values=1)
    digits = digits.reshape(*codes.shape[:-1], DIGITS_PER_BYTE, width)
    value = digits[..., 0, :]
    for j in range(1, DIGITS_PER_BYTE):
        value = 3 * value + digits[..., j, :]
    return ((256 * value + jnp.uint16(242)) // jnp.uint16(243)).astype(jnp.uint8)


def _leading_fraction(packed: jax.Array, j: int) -> jax.Array:
    """``b · 3^j mod 256`` as uint16, whose carry past 256 when tripled is digit j."""
    return (packed * jnp.uint8(3**j)).astype(jnp.uint16)


def _check_width(packed: jax.Array, k: int, packing: Packing) -> None:
    if packed.shape[-1] != packed_width(k, packing):
        raise ValueError(
            f"rows of {k} codes packed as {packing} have {packed_width(k, packing)} bytes, "
            f"found {packed.shape[-1]}"
        )


def _codes_per_byte(packing: Packing) -> int:
    if packing not in get_args(Packing):
        raise ValueError(f"packings are {', '.join(get_args(Packing))}; found {packing!r}")
    return CODES_PER_BYTE if packing == "ternary2" else DIGITS_PER_BYTE


def _shifts(ndim: int) -> jax.Array:
    """Bit positions of the fields of a byte, on the last of ``ndim`` axes."""
    shifts = jnp.arange(CODES_PER_BYTE, dtype=jnp.uint8) * 2
    return jnp.expand_dims(shifts, range(ndim - 1))
