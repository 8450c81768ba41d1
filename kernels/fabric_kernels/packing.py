"""Byte layouts of packed ternary weights.

A *code* is -1, 0 or +1. A matrix of codes has shape [N, K]: N outputs, K inputs (the contracted
axis). The one layout here is

``ternary2`` (2 bits a weight)::

    packed uint8 [N, ceil(K / 4)]

    byte i of a row      bit 7 6   5 4   3 2   1 0
    holds code of k =        4i+3  4i+2  4i+1  4i

A field stores code + 1, so 0, 1, 2 stand for -1, 0, +1 and 3 never occurs. The tail of a row whose
K is not divisible by 4 is filled with code 0. Least significant bits first makes the layout equal
to a bit-cast of the byte to ``uint2[4]``, and keeping K on the last axis lets both operands of the
matmul be contracted on their last axis, which is the fast form of integer dots.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Int8, UInt8

CODES_PER_BYTE = 4


def packed_width(k: int) -> int:
    """Bytes in a row of ``k`` codes."""
    return -(-k // CODES_PER_BYTE)


def bits_per_weight(n: int, k: int, scale_bits: int = 32) -> float:
    """Stored bits a weight of an [n, k] matrix, its one scale and every pad bit counted."""
    return (8 * n * packed_width(k) + scale_bits) / (n * k)


def pack_ternary2(codes: Int8[Array, "*stack n k"]) -> UInt8[Array, "*stack n k/4"]:
    """Packs codes in {-1, 0, 1}, four a byte along the last axis.

    Codes outside that range are a caller's error and are not looked for: under ``jit`` values can't
    be tested. Readers of files validate before they call this.
    """
    k = codes.shape[-1]
    pad = packed_width(k) * CODES_PER_BYTE - k
    fields = (codes.astype(jnp.int8) + 1).astype(jnp.uint8)
    fields = jnp.pad(fields, [(0, 0)] * (codes.ndim - 1) + [(0, pad)], constant_values=1)
    fields = fields.reshape(*codes.shape[:-1], -1, CODES_PER_BYTE)
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
    fields = fields.reshape(*packed.shape[:-1], -1)
    return (fields.astype(dtype) - jnp.asarray(1, dtype))[..., :k]


def _shifts(ndim: int) -> jax.Array:
    """Bit positions of the fields of a byte, on the last of ``ndim`` axes."""
    shifts = jnp.arange(CODES_PER_BYTE, dtype=jnp.uint8) * 2
    return jnp.expand_dims(shifts, range(ndim - 1))
