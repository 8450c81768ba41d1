"""Causal self-attention with grouped key/value heads."""

import jax
from fabric_kernels.attention import Angles, attention
from fabric_kernels.ternary_matmul import Implementation
from flax import nnx
from jaxtyping import Array, Bool, Float

from fabric_jax.layers.bit_linear import BitLinear, LayerContext, LinearOptions, apply_together
from fabric_jax.layers.norm import RMSNorm
from fabric_jax.layers.rope import rotate


def attend(
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B S K hd"],
    v: Float[Array, "B S K hd"],
    mask: Bool[Array, "B T S"],
    scale: float | None = None,
    *,
    angles: Angles | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T H hd"]:
    """``softmax(scale · q·k^T)·v`` where ``mask`` is true; the softmax in float32.

    Without a scale it is ``1 / sqrt(hd)``. With angles q and k are turned first, see
    :func:`fabric_jax.layers.rope.rotary_angles`. ``implementation`` says what runs; ``None`` picks.
    Query heads share key/value heads in order: head h reads h // (H / K). A query that sees nothing
    (padding) gets the mean of all values, which nothing reads.
    """
    return attention(q, k, v, mask, scale=scale, angles=angles, implementation=implementation)


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
            dtype, stack = options.dtype, options.stack
            return RMSNorm(
                size,
                eps=eps,
                dtype=dtype,
                stack=stack,
                offset=norm_offset,
                implementation=options.implementation,
            )

        self.q_norm = norm(head_dim, qk_norm_eps)
        self.k_norm = norm(head_dim, qk_norm_eps)
        self.sub_norm = norm(query, sub_norm_eps)
        self.head_dim = head_dim

    def project(
        self,
        x: Float[Array, "B T D"],
        angles: Angles | None,
        context: LayerContext | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values [B, T, heads, hd], queries and keys normalised and turned.

        Without angles they are not turned: :func:`attend` does it.
        """
        q, k, v = (
            y.reshape(*x.shape[:2], -1, self.head_dim)
            for y in apply_together([self.q, self.k, self.v], x, context)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        return q, k, v

    def close(self, heads: Float[Array, "B T H hd"], context: LayerContext | None) -> jax.Array:
        """Joins the heads to [B, T, D]."""
        x = heads.reshape(*heads.shape[:2], -1)
        if self.sub_norm is not None:
            x = self.sub_norm(x)
        return self.o(x, context)
