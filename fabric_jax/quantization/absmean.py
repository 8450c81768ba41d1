"""The ternary weight quantiser of BitNet b1.58 (Ma et al. 2024, arXiv:2402.17764, section 2)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8

EPSILON = 1e-5


def absmean_scale(weight: Float[Array, "n k"]) -> Float32[Array, ""]:
    """``a = max(mean|W|, 1e-5)`` over the whole matrix, in float32."""
    return jnp.maximum(jnp.mean(jnp.abs(weight.astype(jnp.float32))), EPSILON)


def absmean_quantize(
    weight: Float[Array, "n k"],
) -> tuple[Int8[Array, "n k"], Float32[Array, ""]]:
    """Quantises a matrix to codes -1, 0, +1 and the one scale that multiplies them.

    ``codes = clip(rint(W · (1/a)), -1, 1)``, ties to even, in float32 whatever the dtype of ``W``.
    The released code multiplies by the reciprocal (``r = 1/a``) and de-quantises by dividing by it,
    so the scale returned is ``1/r``, which can differ from ``a`` by one unit in the last place.

    The quantiser is not idempotent: on ``a·T`` it returns the scale ``p·a``, where p is the share
    of non-zero codes. Never run it on weights that are ternary already.
    """
    reciprocal = 1.0 / absmean_scale(weight)
    codes = jnp.clip(jnp.rint(weight.astype(jnp.float32) * reciprocal), -1, 1)
    return codes.astype(jnp.int8), 1.0 / reciprocal


def absmean_fake_quantize(weight: jax.Array) -> jax.Array:
    """``W`` replaced by ``codes / r``, in the dtype of ``W``."""
    reciprocal = 1.0 / absmean_scale(weight)
    codes = jnp.clip(jnp.rint(weight.astype(jnp.float32) * reciprocal), -1, 1)
    return (codes / reciprocal).astype(weight.dtype)
