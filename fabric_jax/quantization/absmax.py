"""Activation quantisers: what a BitLinear does to its input before the integer product."""

from typing import Literal

import jax
import jax.numpy as jnp
from fabric_kernels import absmax_quantize as absmax_quantize

ActQuant = Literal["per_token", "block256", "none"]
"""``per_token`` is BitNet's rule; ``block256`` what llama.cpp computes on CPU; ``none`` neither."""

BLOCK = 256
SMALLEST = 1e-35


def absmax_fake_quantize(x: jax.Array) -> jax.Array:
    """``x`` replaced by ``codes / s``, in the dtype of ``x``."""
    codes, scale = absmax_quantize(x)
    return (codes.astype(jnp.float32) / scale).astype(x.dtype)


def block256_fake_quantize(x: jax.Array) -> jax.Array:
    """``x`` replaced by what llama.cpp's Q8_K blocks of 256 along the last axis make of it.

    In each block the scale comes from the element of largest magnitude with its sign:
    ``i = -127/m``, ``codes = min(127, rint(i·x))``, value ``codes / i`` (``quantize_row_q8_K`` of
    ggml; with the sign the largest element maps to -127 exactly). A block of zeros stays zero, and
    so becomes one below 1e-35, where float32 can't hold both ``127/m`` and its reciprocal. The last
    block may be short.
    """
    k = x.shape[-1]
    pad = -k % BLOCK
    blocks = jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 1) + [(0, pad)])
    blocks = blocks.reshape(*x.shape[:-1], -1, BLOCK)
    where = jnp.argmax(jnp.abs(blocks), axis=-1, keepdims=True)
    largest = jnp.take_along_axis(blocks, where, axis=-1)
    zero = jnp.abs(largest) < SMALLEST
    inverse = -127.0 / jnp.where(zero, 1.0, largest)
    codes = jnp.minimum(jnp.rint(blocks * inverse), 127.0)
    values = jnp.where(zero, 0.0, codes / inverse)
    return values.reshape(*x.shape[:-1], -1)[..., :k].astype(x.dtype)
