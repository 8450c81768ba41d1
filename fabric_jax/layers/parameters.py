"""Parameters of a model: whose they are, and how random ones are made.

Modules declare shapes and dtypes only; nothing is allocated until ``models.initialize`` fills the
declared tree leaf by leaf or a checkpoint does. So a model never exists in another format than its
final one, and every tensor has a random key of its own.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from fabric_kernels import Packing, packed_width, repack
from fabric_kernels.block_quantization import ZERO4, TableBits, code_bytes
from flax import nnx
from jax import lax
from jax.extend.random import threefry_2x32
from jax.typing import DTypeLike

DRAWN_BYTES = 1 << 20
"""Packed bytes that are drawn at a time."""


class BaseParam(nnx.Variable[jax.Array]):
    """A weight of the base model: frozen under LoRA, trained from scratch otherwise."""


class AdapterParam(nnx.Param[jax.Array]):
    """A weight of a LoRA adapter."""


class Initializer(Protocol):
    """Makes one tensor (of one layer) from its own key."""

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        """An array of ``shape`` and ``dtype``."""
        ...


@dataclass(frozen=True)
class Constant:
    """Every element is ``value``."""

    value: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        """An array of ``shape`` and ``dtype``."""
        del key
        return jnp.full(shape, self.value, dtype)


@dataclass(frozen=True)
class Normal:
    """Gaussian with mean 0."""

    std: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        """An array of ``shape`` and ``dtype``."""
        return jax.random.normal(key, shape, dtype) * jnp.asarray(self.std, dtype)


@dataclass(frozen=True)
class Uniform:
    """Uniform in [-bound, bound]."""

    bound: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        """An array of ``shape`` and ``dtype``."""
        return jax.random.uniform(key, shape, dtype, -self.bound, self.bound)


ABSMAX_OF_GROUP = 2.347
"""Expected largest magnitude of 32 standard normal numbers."""


def normal_scale(std: float, bits: TableBits) -> float:
    """The scale that a group of 32 Gaussian values has on average."""
    return std * ABSMAX_OF_GROUP / (127 if bits == 8 else 8)


@dataclass(frozen=True)
class NormalCodes:
    """Codes of a quantised Gaussian table whose scales are all ``normal_scale(std, bits)``.

    Values beyond the range are clipped, 2 % of them. Blocks of rows are floats only while they are
    drawn (``models.initialize``).

    Attributes:
        k: codes in a row.
        bits: 8 or 4, see ``fabric_kernels.block_quantization``.
    """

    k: int
    bits: TableBits

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        """An array of ``shape`` and ``dtype``: int8, or uint8 with two codes a byte."""
        if self.bits == 8:
            values = jax.random.normal(key, shape, jnp.float32) / normal_scale(1.0, 8)
            return jnp.clip(jnp.round(values), -127, 127).astype(dtype)
        values = jax.random.normal(key, (*shape, 2), jnp.float32) / normal_scale(1.0, 4)
        codes = jnp.clip(jnp.round(values) + ZERO4, 0, 15).astype(dtype)
        if self.k < 2 * code_bytes(self.k, 4):
            codes = codes.at[..., -1, 1].set(ZERO4)
        return codes[..., 0] | codes[..., 1] << jnp.asarray(4, dtype)


@dataclass(frozen=True)
class RandomTernary:
    """Packed random codes, each of -1, 0, 1 equally likely, with no wider copy on the way.

    A byte of four codes takes one of 81 values, so bytes are drawn from a table of those. A key
    gives the same codes in every layout: they are drawn in ``ternary2`` and re-packed.

    Attributes:
        k: codes in a row; the fields after them hold code 0.
        packing: layout of the bytes.
    """

    k: int
    packing: Packing = "ternary2"

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        """An array of ``shape`` and ``dtype``, which must be uint8.

        A block of rows at a time: scratch is 16 bytes for each of ``DRAWN_BYTES``.
        """
        rows, width = math.prod(shape[:-1]), packed_width(self.k)
        block = min(rows, max(1, DRAWN_BYTES // max(1, width)))
        if block == 0:
            return jnp.zeros(shape, dtype)

        def write(index: jax.Array, out: jax.Array) -> jax.Array:
            # The last block ends with the last row; rows that two blocks share come out alike.
            start = jnp.minimum(index * block, rows - block)
            draws = random_bits16(key, (rows, width), start, block)
            part = repack(self._bytes(draws), self.k, "ternary2", self.packing)
            return lax.dynamic_update_slice_in_dim(out, part.astype(dtype), start, 0)

        empty = jnp.zeros((rows, shape[-1]), dtype)
        return lax.fori_loop(0, -(-rows // block), write, empty).reshape(shape)

    def _bytes(self, draws: jax.Array) -> jax.Array:
        """Bytes in the layout ``ternary2`` from as many random numbers of 16 bits."""
        fields = np.stack(np.meshgrid(*[np.arange(3)] * 4, indexing="ij")).reshape(4, 81)
        table = (fields << np.array([[0], [2], [4], [6]])).sum(0).astype(np.uint8)
        # 16 bits a draw: the excess of the first values is under 0.2 %.
        packed = jnp.asarray(table)[draws % jnp.uint16(81)]
        used = self.k % 4
        if used == 0:
            return packed
        keep, zeros = (1 << 2 * used) - 1, 0b01010101 & ~((1 << 2 * used) - 1)
        last = packed[..., -1] & jnp.uint8(keep) | jnp.uint8(zeros)
        return packed.at[..., -1].set(last)


def random_bits16(
    key: jax.Array, shape: tuple[int, int], start: jax.Array, count: int
) -> jax.Array:
    """Rows of ``jax.random.bits(key, shape, uint16)``, without the others where that can be.

    Args:
        key: typed.
        shape: [N, W] of the whole.
        start: int32 [], the first row.
        count: how many rows.
    """
    by_element = str(jax.random.key_impl(key)) == "threefry2x32"
    by_element = by_element and bool(getattr(jax.config, "jax_threefry_partitionable", True))
    if not by_element or math.prod(shape) >= 1 << 32:
        whole = jax.random.bits(key, shape, jnp.uint16)
        return lax.dynamic_slice_in_dim(whole, start, count)
    # By default jax hashes the 64-bit index of each element by itself and joins the two words by
    # xor (``jax_threefry_partitionable``); a test compares with its own function.
    size = count * shape[1]
    low = jnp.uint32(start) * jnp.uint32(shape[1]) + jnp.arange(size, dtype=jnp.uint32)
    hashed = threefry_2x32(jax.random.key_data(key), jnp.concatenate([jnp.zeros_like(low), low]))
    return (hashed[:size] ^ hashed[size:]).astype(jnp.uint16).reshape(count, shape[1])


def declare_base(
    shape: tuple[int, ...],
    dtype: DTypeLike,
    initializer: Initializer,
    *,
    stack: tuple[int, ...] = (),
) -> BaseParam:
    """A base parameter of ``shape`` in each layer of ``stack``, not yet allocated."""
    return BaseParam(
        jax.ShapeDtypeStruct((*stack, *shape), jnp.dtype(dtype)),  # pyright: ignore[reportArgumentType]
        initializer=initializer,
        stacked=bool(stack),
    )


def declare_adapter(
    shape: tuple[int, ...],
    dtype: DTypeLike,
    initializer: Initializer,
    *,
    stack: tuple[int, ...] = (),
) -> AdapterParam:
    """An adapter parameter of ``shape`` in each layer of ``stack``, not yet allocated."""
    return AdapterParam(
        jax.ShapeDtypeStruct((*stack, *shape), jnp.dtype(dtype)),  # pyright: ignore[reportArgumentType]
        initializer=initializer,
        stacked=bool(stack),
    )
