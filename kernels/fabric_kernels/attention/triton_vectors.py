"""Vectors of heads in Triton kernels, up to a power of two: loaded, turned, quantised, stored."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from fabric_kernels.triton_call import Mode

Ref = Any
_ROUNDER = 1.5 * 2**23
"""Added and taken away it rounds a float32 of at most 2^22, half to even; XLA leaves it out."""


def vectors(ref: Ref, row: Any, heads: jax.Array, order: jax.Array | None = None) -> jax.Array:
    """Float32 vectors of heads of [B, 1, H, hd], zeros past hd; channels in an order."""
    width = ref.shape[-1]
    shape = (heads.shape[0], 1 << (width - 1).bit_length())
    channels = lax.broadcasted_iota(jnp.int32, shape, 1)
    at = ref.at[
        row, 0, lax.broadcast_in_dim(heads, shape, (0,)), channels if order is None else order
    ]
    x = plgpu.load(at, mask=channels < width, other=jnp.zeros((), ref.dtype))
    return x.astype(jnp.float32)


def turned(ref: Ref, row: Any, heads: jax.Array, turn: tuple[Ref, Ref]) -> jax.Array:
    """Heads turned by their position, each step in the dtype that ``xla.rotate`` has there."""
    width, dtype = ref.shape[-1], ref.dtype
    half = width // 2
    shape = (heads.shape[0], 1 << (width - 1).bit_length())
    channels = lax.broadcasted_iota(jnp.int32, shape, 1)
    is_first = channels < half
    angle = jnp.where(is_first, channels, channels - half)
    cos, sin = (
        plgpu.load(part.at[row, 0, angle], mask=channels < width, other=jnp.zeros((), part.dtype))
        for part in turn
    )
    other = jnp.where(is_first, channels + half, channels - half)
    across = vectors(ref, row, heads, other).astype(dtype) * sin.astype(dtype)
    along = vectors(ref, row, heads).astype(dtype) * cos.astype(dtype)
    return jnp.where(is_first, along - across, along + across).astype(jnp.float32)


def stored_form(x: jax.Array, dtype: Any, mode: Mode) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A vector [1, hd] as the cache gives it back, float32; as it stores it; and int8's scale."""
    if dtype != jnp.int8:
        codes = x.astype(dtype)
        return codes.astype(jnp.float32), codes, jnp.ones((), jnp.float32)
    scale = jnp.max(jnp.abs(x)) * jnp.float32(1 / 127)
    inverse = jnp.where(scale > 0, 1.0 / jnp.where(scale > 0, scale, 1.0), 0.0)
    exact = x * inverse
    whole = jnp.rint(exact) if mode == "interpret" else (exact + _ROUNDER) - _ROUNDER
    rounded = jnp.clip(whole, -127.0, 127.0)
    return rounded * scale, rounded.astype(jnp.int8), scale


def store_vectors(ref: Ref, place: tuple[Any, ...], x: jax.Array, width: int, count: int) -> None:
    """The first ``count`` of vectors at places, in the dtype of an array."""
    rows, channels = (lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1))
    *lead, vectors = place
    at = ref.at[(*lead, lax.broadcast_in_dim(vectors, x.shape, (0,)), channels)]
    plgpu.store(at, x.astype(ref.dtype), mask=(rows < count) & (channels < width))
