"""The online Hadamard transform of BitNet v2 (Wang et al. 2025, arXiv:2504.18415)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

LARGEST_FACTOR = 64


def hadamard_transform(x: Float[Array, "*batch k"]) -> Float[Array, "*batch k"]:
    """``x · H`` with an orthogonal, symmetric H: its own inverse and its own gradient.

    H is block-diagonal; a block is Sylvester's matrix of the largest power of two that divides K,
    over its square root. (The paper has K a power of two, so that there is one block.) A block of
    ``m`` is a Kronecker product of factors up to 64, each a small matmul. Computed in the dtype of
    ``x``; float32 is not rounded to less on any device.
    """
    k = x.shape[-1]
    factors = _factors(k & -k)
    y = x.reshape(*x.shape[:-1], k // math.prod(factors), *factors)
    axes = range(x.ndim, x.ndim + len(factors))
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    for axis, size in zip(axes, factors, strict=True):
        matrix = jnp.asarray(_sylvester(size), x.dtype)
        y = jnp.moveaxis(jnp.tensordot(y, matrix, axes=(axis, 0), precision=precision), -1, axis)
    return y.reshape(x.shape)


def _factors(size: int) -> list[int]:
    """Powers of two up to 64 whose product is ``size``."""
    factors: list[int] = []
    while size > LARGEST_FACTOR:
        factors.append(LARGEST_FACTOR)
        size //= LARGEST_FACTOR
    return [*factors, size]


def _sylvester(size: int) -> np.ndarray:
    """The normalised Hadamard matrix [size, size], size a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / math.sqrt(size)
