"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467), Llama's form."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from fabric_jax.layers.parameters import Constant, declare_base


class RMSNorm(nnx.Module):
    """``x · rsqrt(mean(x²) + eps)`` in float32, cast back, then times the gain."""

    def __init__(
        self, size: int, *, eps: float, dtype: DTypeLike, stack: tuple[int, ...] = ()
    ) -> None:
        """Declares the gain, [size] in each layer of ``stack``."""
        self.gain = declare_base((size,), dtype, Constant(1.0), stack=stack)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis of ``x`` [..., size]."""
        wide = x.astype(jnp.float32)
        normal = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        gain = self.gain[...].astype(x.dtype)
        return normal.astype(x.dtype) * jnp.expand_dims(gain, range(x.ndim - 1))
