"""Causal self-attention with grouped key/value heads."""

from functools import partial
from typing import Literal

import jax
from fabric_kernels.attention import Angles, attention, cudnn_attention
from fabric_kernels.ternary_matmul import Implementation
from flax import nnx
from jaxtyping import Array, Bool, Float

from fabric_jax.layers.bit_linear import (
    BitLinear,
    LayerContext,
    LinearOptions,
    apply_after,
    apply_beside,
)
from fabric_jax.layers.norm import RMSNorm
from fabric_jax.layers.residuals import Twin, on_both
from fabric_jax.layers.rope import rotate

AttentionChoice = Literal["auto", "cudnn", "cudnn-causal"]
Projected = tuple[jax.Array | Twin, jax.Array | Twin, jax.Array | Twin]
"""Queries, keys and values."""


def attend(
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B S K hd"],
    v: Float[Array, "B S K hd"],
    mask: Bool[Array, "B T S"],
    scale: float | None = None,
    *,
    angles: Angles | None = None,
    implementation: Implementation | None = None,
    choice: AttentionChoice = "auto",
) -> Float[Array, "B T H hd"]:
    """``softmax(scale · q·k^T)·v`` where ``mask`` is true; the softmax in float32.

    Without a scale it is ``1 / sqrt(hd)``. With angles q and k are turned first, see
    :func:`fabric_jax.layers.rope.rotary_angles`. ``implementation`` says what runs; ``None`` picks.
    Query heads share key/value heads in order: head h reads h // (H / K). A query that sees nothing
    (padding) gets the mean of all values, which nothing reads. ``choice`` may name cuDNN's
    attention instead; ``cudnn-causal`` lets a query see all keys before it and reads no mask.
    """
    if choice != "auto":
        return cudnn_attention(
            q, k, v, None if choice == "cudnn-causal" else mask, scale=scale, angles=angles
        )
    return attention(q, k, v, mask, scale=scale, angles=angles, implementation=implementation)


def split_heads(head_dim: int, y: jax.Array) -> Float[Array, "B T H hd"]:
    """``y`` [B, T, H·hd] by heads."""
    return y.reshape(*y.shape[:2], -1, head_dim)


def join_heads(heads: Float[Array, "B T H hd"]) -> jax.Array:
    """[B, T, H·hd]."""
    return heads.reshape(*heads.shape[:2], -1)


class Attention(nnx.Module):
    """Projections, norms of heads, rotary positions, attention, sub-norm, output projection."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        sub_norm_eps: float | None,
        qk_norm_eps: float | None = None,
        norm_offset: float = 0.0,
        options: LinearOptions,
    ) -> None:
        """Declares the projections, and those norms whose epsilon is not None."""
        query, key = num_heads * head_dim, num_kv_heads * head_dim
        self.q = BitLinear("q", query, hidden_size, options)
        self.k = BitLinear("k", key, hidden_size, options)
        self.v = BitLinear("v", key, hidden_size, options)
        self.o = BitLinear("o", hidden_size, query, options)

        def norm(size: int, eps: float | None) -> RMSNorm | None:
            if eps is None:
                return None
            dtype, stack = options.norm_dtype or options.dtype, options.stack
            return RMSNorm(
                size,
                eps=eps,
                dtype=dtype,
                stack=stack,
                offset=norm_offset,
                implementation=options.side,
            )

        self.q_norm = norm(head_dim, qk_norm_eps)
        self.k_norm = norm(head_dim, qk_norm_eps)
        self.sub_norm = norm(query, sub_norm_eps)
        self.head_dim = head_dim

    def project(
        self,
        norm: RMSNorm | None,
        x: Float[Array, "B T D"] | Twin,
        angles: Angles | None,
        context: LayerContext | None,
    ) -> tuple[Projected, jax.Array | Twin]:
        """Queries, keys and values [B, T, heads, hd] of ``norm(x)``, the first two turned; and x.

        Where the model has norms for queries and keys, they are normalised before. What else reads
        ``x`` reads the one that is returned, see ``RMSNorm.beside``.

        Without angles they are not turned: :func:`attend` does it.
        """
        outputs, x = apply_beside(norm, [self.q, self.k, self.v], x, context)
        q, k, v = (on_both(partial(split_heads, self.head_dim), y) for y in outputs)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = on_both(self.q_norm, q), on_both(self.k_norm, k)
        if angles is not None:
            q, k = on_both(rotate, q, angles), on_both(rotate, k, angles)
        return (q, k, v), x

    def close(
        self,
        heads: Float[Array, "B T H hd"] | Twin,
        context: LayerContext | None,
        residual: jax.Array | Twin | None = None,
    ) -> jax.Array | Twin:
        """Joins the heads to [B, T, D], added to a residual where there is one."""
        x = on_both(join_heads, heads)
        return apply_after(self.sub_norm, [self.o], x, context, residual)[0]
