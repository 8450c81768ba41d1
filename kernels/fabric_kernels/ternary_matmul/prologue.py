"""What happens to the input of a linear before it is quantised: a gate, an RMS norm."""

from dataclasses import dataclass, field, replace
from functools import partial

import jax
from jax import lax

from fabric_kernels.norm import Gate, gated_product, rms_norm
from fabric_kernels.ternary_matmul.select import SideImplementation


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["gate", "gain"],
    meta_fields=["activation", "eps"],
)
@dataclass(frozen=True, kw_only=True)
class Prologue:
    """``norm(act(gate) · x)``, either part of which may be missing.

    Attributes:
        gate: [..., K], of the shape and dtype of ``x``; None for no gate.
        gain: [K] of the norm, see :func:`fabric_kernels.norm.rms_norm`, or a stack [L, K] of which
            the layer of the weights is read; None for no norm.
        activation: of the gate; None where there is none.
        eps: of the norm.
    """

    gate: jax.Array | None = None
    gain: jax.Array | None = None
    activation: Gate | None = field(default=None, metadata={"static": True})
    eps: float = field(default=0.0, metadata={"static": True})

    def of_layer(self, layer: jax.Array | None) -> "Prologue":
        """With the gain of one layer."""
        if self.gain is None or self.gain.ndim == 1:
            return self
        if layer is None:
            raise ValueError("a stack of gains goes with stacks of weights")
        return replace(self, gain=lax.dynamic_index_in_dim(self.gain, layer, keepdims=False))


def apply_prologue(
    x: jax.Array, prologue: Prologue, *, implementation: SideImplementation | None
) -> jax.Array:
    """``norm(act(gate) · x)``, [..., K] in the dtype of ``x``."""
    gate, activation, gain = prologue.gate, prologue.activation, prologue.gain
    if gate is not None and activation is not None:
        return gated_product(gate, x, activation, gain, prologue.eps, implementation=implementation)
    if gate is not None and activation is None:
        raise ValueError("a gate needs an activation")
    return x if gain is None else rms_norm(x, gain, prologue.eps, implementation=implementation)
