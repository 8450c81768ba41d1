"""The gated feed-forward."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from fabric_jax.layers.bit_linear import BitLinear, LayerContext, LinearOptions, apply_together
from fabric_jax.layers.norm import RMSNorm

Activation = Literal["silu", "relu2", "gelu"]


def squared_relu(x: jax.Array) -> jax.Array:
    """``max(x, 0)²`` (So et al. 2021, arXiv:2109.08668)."""
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "relu2": squared_relu,
    "gelu": partial(jax.nn.gelu, approximate=True),
}


class FeedForward(nnx.Module):
    """``down(norm(act(gate(x)) · up(x)))``, the norm only where the model has sub-norms."""

    def __init__(
        self,
        *,
        hidden_size: int,
        ffn_size: int,
        activation: Activation,
        sub_norm_eps: float | None,
        norm_offset: float = 0.0,
        options: LinearOptions,
    ) -> None:
        """Declares the three linears, and the sub-norm unless its epsilon is None."""
        self.gate = BitLinear("gate", ffn_size, hidden_size, options)
        self.up = BitLinear("up", ffn_size, hidden_size, options)
        self.down = BitLinear("down", hidden_size, ffn_size, options)
        self.sub_norm = (
            None
            if sub_norm_eps is None
            else RMSNorm(
                ffn_size,
                eps=sub_norm_eps,
                dtype=options.dtype,
                stack=options.stack,
                offset=norm_offset,
            )
        )
        self.activation: Activation = activation

    def __call__(self, x: jax.Array, context: LayerContext | None = None) -> jax.Array:
        """[B, T, D] to [B, T, D]."""
        gate, up = apply_together([self.gate, self.up], x, context)
        product = ACTIVATIONS[self.activation](gate) * up
        if self.sub_norm is not None:
            product = self.sub_norm(product)
        return self.down(product, context)
