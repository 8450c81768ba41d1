"""The implementation in plain jax, which XLA compiles for every device."""

import jax
import jax.numpy as jnp
from jax import lax


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns channel i of ``x`` [B, T, heads, hd] against channel i + hd/2, in the dtype of ``x``.

    The angles are given as cosine and sine [B, T, hd/2].
    """
    cos, sin = (part.astype(x.dtype)[:, :, None, :] for part in angles)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float) -> jax.Array:
    """``softmax(scale · q·k^T)·v`` where ``mask`` is true; the softmax in float32."""
    groups = q.shape[2] // k.shape[2]
    q = q.reshape(*q.shape[:2], k.shape[2], groups, q.shape[-1])
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = jnp.einsum(
        "btkgd,bskd->bkgts", q, k, precision=precision, preferred_element_type=jnp.float32
    )
    scores = jnp.where(mask[:, None, None], scores * scale, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v, precision=precision)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])
