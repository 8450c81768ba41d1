"""Flash attention of cuDNN (Dao et al. 2022, arXiv:2205.14135), through jax; NVIDIA GPUs only."""

import jax
import jax.numpy as jnp

from fabric_kernels.attention.xla import rotate


def cudnn_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    *,
    scale: float | None = None,
    angles: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """``softmax(scale · q·k^T)·v`` where ``mask`` is true; the softmax in float32.

    Args:
        q: [B, T, H, hd], bfloat16 or float16; hd a multiple of 8, at most 128.
        k: [B, S, K, hd].
        v: [B, S, K, hd].
        mask: bool [B, T, S]; None for causal, which reads no mask and is faster.
        scale: factor on the scores; None for ``1 / sqrt(hd)``.
        angles: of rotary positions, as in ``api.attention``.

    Returns:
        [B, T, H, hd] in the dtype of q. Differentiable in q, k and v.

    Raises:
        RuntimeError: there is no cuDNN, or it does not take these shapes; it never falls back.
        TypeError: the inputs are not in half precision.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise TypeError(f"cuDNN's attention takes bfloat16 or float16, found {q.dtype}")
    if angles is not None:
        q, k = rotate(q, angles), rotate(k, angles)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=None if mask is None else mask[:, None],
        scale=scale,
        is_causal=mask is None,
        implementation="cudnn",
    )
