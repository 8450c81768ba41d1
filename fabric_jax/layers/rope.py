"""Rotary positions (Su et al. 2021, arXiv:2104.09864), turning halves as GPT-NeoX and Llama do."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32


def rotary_angles(
    positions: Int32[Array, "B T"], head_dim: int, theta: float
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Cosine and sine of ``position · theta^(-2i/head_dim)``, float32.

    The frequencies are computed in float64 and rounded once: float32 powers differ between
    libraries by more than the angle at position 4,000 can bear.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequencies = jnp.asarray((theta**-exponents).astype(np.float32))
    angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T H hd"],
    angles: tuple[Float[Array, "B T half"], Float[Array, "B T half"]],
) -> Float[Array, "B T H hd"]:
    """Turns channel i against channel i + hd/2 of every head, in the dtype of ``x``."""
    cos, sin = (part.astype(x.dtype)[:, :, None, :] for part in angles)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
