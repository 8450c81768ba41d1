"""The gated feed-forward."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from fabric_jax.layers.bit_linear import BitLinear, LinearOptions
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
        options: LinearOptions,
    ) -> None:
        """Declares the three linears, and the sub-norm unless its epsilon is None."""
        self.gate = BitLinear("gate", ffn_size, hidden_size, options)
        self.up = BitLinear("up", ffn_size, hidden_size, options)
        self.down = BitLinear("down", hidden_size, ffn_size, options)
        self.sub_norm = (
            None
            if sub_norm_eps is None
            else RMSNorm(ffn_size, eps=sub_norm_eps, dtype=options.dtype, stack=options.stack)
        )
        self.activation: Activation = activation

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """[B, T, D] to [B, T, D]."""
        gate = ACTIVATIONS[self.activation](self.gate(x, dropout_key))
        product = gate * self.up(x, dropout_key)
        if self.sub_norm is not None:
            product = self.sub_norm(product)
        return self.down(product, dropout_key)
