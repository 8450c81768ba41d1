"""The gated feed-forward."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from fabric_kernels import Prologue, gated_product
from fabric_kernels.ternary_matmul import SideImplementation
from flax import nnx

from fabric_jax.layers.bit_linear import (
    BitLinear,
    LayerContext,
    LinearOptions,
    apply_after,
    apply_beside,
    apply_together,
    takes_prologue,
)
from fabric_jax.layers.norm import RMSNorm
from fabric_jax.layers.residuals import Twin, on_both

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
                dtype=options.norm_dtype or options.dtype,
                stack=options.stack,
                offset=norm_offset,
                implementation=options.side,
            )
        )
        self.activation: Activation = activation
        self.implementation: SideImplementation | None = options.side

    def __call__(
        self,
        x: jax.Array | Twin,
        context: LayerContext | None = None,
        norm: RMSNorm | None = None,
        residual: jax.Array | Twin | None = None,
    ) -> jax.Array | Twin:
        """[B, T, D] to [B, T, D], of ``norm(x)`` where there is a norm, added to a residual.

        The gradients by ``x`` of the norm and of a residual that is ``x`` itself are added up in
        the norm's kernel, where there is one.
        """
        (gate, up), stream = apply_beside(norm, [self.gate, self.up], x, context)
        residual = stream if residual is x else residual
        prologue = None if isinstance(gate, Twin) else self._prologue(gate)
        if prologue is None or not takes_prologue([self.down], up, context, prologue):
            product = on_both(self.combine, gate, up)
            return apply_after(None, [self.down], product, context, residual)[0]
        return apply_together([self.down], up, context, prologue, residual)[0]

    def _prologue(self, gate: jax.Array) -> Prologue | None:
        """:meth:`combine` as what ``down`` does first; None where it isn't of that form."""
        norm = self.sub_norm
        if self.activation == "gelu" or (norm is not None and norm.offset):
            return None
        return Prologue(
            gate=gate,
            activation=self.activation,
            gain=None if norm is None else norm.gains,
            eps=0.0 if norm is None else norm.eps,
        )

    def combine(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """The normalised gated product, [B, T, F]."""
        norm = self.sub_norm
        if self.activation == "gelu" or (norm is not None and norm.offset):
            product = ACTIVATIONS[self.activation](gate) * up
            return product if norm is None else norm(product)
        return gated_product(
            gate,
            up,
            self.activation,
            None if norm is None else norm.gain[...],
            0.0 if norm is None else norm.eps,
            implementation=self.implementation,
        )
