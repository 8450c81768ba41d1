"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from fabric_kernels import Prologue, rms_norm, rms_norm_beside
from fabric_kernels.ternary_matmul import SideImplementation
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from fabric_jax.layers.parameters import Constant, declare_base


@dataclass(frozen=True, eq=False)
class GainStack:
    """The gains [L, size] of all layers, which kernels read where they lie; not a parameter."""

    gains: jax.Array


class RMSNorm(nnx.Module):
    """``x · rsqrt(mean(x²) + eps)`` in float32, times the gain.

    Without an offset the gain comes after the cast back to the dtype of ``x``, as in Llama; with
    one, ``offset + gain`` comes before it, in float32, as in Gemma.
    """

    def __init__(
        self,
        size: int,
        *,
        eps: float,
        dtype: DTypeLike,
        stack: tuple[int, ...] = (),
        offset: float = 0.0,
        implementation: SideImplementation | None = None,
    ) -> None:
        """Declares the gain, [size] in each layer of ``stack``."""
        self.gain = declare_base((size,), dtype, Constant(1.0 - offset), stack=stack)
        self.eps = eps
        self.offset = offset
        self.implementation: SideImplementation | None = implementation
        self.whole: GainStack | None = None

    @property
    def prologue(self) -> Prologue | None:
        """The norm as what a ternary linear does first; None where it has an offset."""
        return None if self.offset else Prologue(gain=self.gains, eps=self.eps)

    @property
    def gains(self) -> jax.Array:
        """[size] of this layer; or of all, where they are known: a slice would be a copy."""
        return self.gain[...] if self.whole is None else self.whole.gains

    def beside(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The normalised ``x`` [..., size], and ``x`` itself for what else reads it.

        Some kernels add up the gradients by both where they compute the first.
        """
        if self.offset:
            return self(x), x
        gain, runs = self.gain[...], self.implementation
        return rms_norm_beside(x, gain, self.eps, implementation=runs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis of ``x`` [..., size]."""
        if not self.offset:
            return rms_norm(x, self.gain[...], self.eps, implementation=self.implementation)
        wide = x.astype(jnp.float32)
        normal = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        gain = jnp.expand_dims(self.gain[...], range(x.ndim - 1)).astype(jnp.float32)
        return (normal * (self.offset + gain)).astype(x.dtype)
