"""Attention: one signature, several implementations."""

from typing import Literal

import jax
import jax.numpy as jnp

from fabric_kernels.attention import cpu, triton, xla
from fabric_kernels.nvidia import AMPERE, compute_capability
from fabric_kernels.ternary_matmul import Implementation, select_implementation

Angles = tuple[jax.Array, jax.Array]
AttentionImplementation = Literal["xla", "cpu", "triton"]


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    scale: float | None = None,
    angles: Angles | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """``softmax(scale · q·k^T)·v`` where ``mask`` is true; the softmax in float32.

    Args:
        q: [B, T, H, hd], floats. Head h reads key/value head h // (H / K).
        k: [B, S, K, hd].
        v: [B, S, K, hd].
        mask: bool [B, T, S], true where query t sees key s. A query that sees nothing gets the mean
            of all values.
        scale: factor on the scores, positive; without one ``1 / sqrt(hd)``.
        angles: cosine and sine [B, T, hd/2] of rotary positions, by which q and k (T = S) are
            turned first; None where they are already. No gradient goes through them.
        implementation: of the products that this belongs to; see ``attention_implementation``.
            What that picks runs or raises.

    Returns:
        [B, T, H, hd] in the dtype of q. Differentiable in q, k and v.

    Raises:
        TypeError: the mask is not bool.
        ValueError: the shapes do not fit, or a name is unknown.
    """
    _check(q, k, v, mask, angles)
    chosen = attention_implementation(implementation, queries=q.shape[1])
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if not factor > 0:
        raise ValueError(f"the scale of attention must be positive, found {factor}")
    if chosen == "cpu":
        empty = jnp.zeros((q.shape[0], 0, 0), jnp.float32)
        cos, sin = (empty, empty) if angles is None else angles
        return cpu.attention(
            (q, k, v, mask, cos.astype(jnp.float32), sin.astype(jnp.float32)), factor
        )
    if angles is not None:
        q, k = xla.rotate(q, angles), xla.rotate(k, angles)
    if chosen == "triton":
        return triton.attention(q, k, v, mask, factor)
    return xla.attention(q, k, v, mask, factor)


def attention_implementation(
    implementation: Implementation | None, *, queries: int
) -> AttentionImplementation:
    """What runs attention beside products of that implementation.

    ``triton``, ``mosaic_gpu`` and ``tuned`` mean the Triton kernels, ``mosaic_tpu`` plain jax.
    ``None`` picks: the CPU kernel, if there is one; the Triton kernels on an NVIDIA GPU from Ampere
    on. One query a row has no use for tiles of queries, so plain jax it is, but where ``cpu`` is
    named.

    Raises:
        ValueError: the name is unknown.
    """
    chosen = select_implementation(implementation)
    if queries == 1 and implementation != "cpu":
        return "xla"
    if chosen in ("triton", "mosaic_gpu", "tuned") or (
        implementation is None and compute_capability() >= AMPERE
    ):
        return "triton"
    return "cpu" if chosen == "cpu" else "xla"


def _check(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, angles: Angles | None
) -> None:
    if mask.dtype != jnp.bool_:
        raise TypeError(f"the mask of attention is bool, found {mask.dtype}")
    if q.ndim != 4 or k.ndim != 4 or k.shape[1] < 1 or k.shape[2] < 1:
        raise ValueError(
            f"attention takes queries [B, T, H, hd] and keys [B, S, K, hd], "
            f"found {list(q.shape)} and {list(k.shape)}"
        )
    batch, queries, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    if k.shape != (batch, keys, kv_heads, width) or v.shape != k.shape or heads % kv_heads:
        raise ValueError(
            f"keys and values [{batch}, S, K, {width}] belong to the queries {list(q.shape)}, K a "
            f"divisor of {heads}; found {list(k.shape)} and {list(v.shape)}"
        )
    if mask.shape != (batch, queries, keys):
        raise ValueError(f"the mask must be {[batch, queries, keys]}, found {list(mask.shape)}")
    if angles is None:
        return
    turns = (batch, queries, width // 2)
    if queries != keys or width % 2 or any(part.shape != turns for part in angles):
        raise ValueError(
            f"angles turn as many keys as queries and are {list(turns)} each; found "
            f"{keys} keys and {[list(part.shape) for part in angles]}"
        )
