"""The codes of a normalised input, with the gradient through both; for training on GPUs."""

from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from fabric_kernels.norm.api import Gate
from fabric_kernels.norm.triton import How
from fabric_kernels.triton_call import kernel_module, on_platform

MOST_CHANNELS = 4096
"""Of a row that a program holds in registers."""
KERNELS = "fabric_kernels.norm.triton_quantised"

_Residuals = tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]
_Outputs = tuple[jax.Array, jax.Array, jax.Array]


class NormalisedCodes(NamedTuple):
    """What products read, and what they give their gradient to.

    Attributes:
        codes: int8 [M, K].
        scale: float32 [M, 1], which divides them.
        stand_in: [M, K] in the dtype of the input, zeros that nothing computes. The gradient by the
            normalised values is given to it, the quantiser counting as identity.
    """

    codes: jax.Array
    scale: jax.Array
    stand_in: jax.Array


def normalised_codes(
    x: jax.Array,
    gain: jax.Array,
    eps: float,
    *,
    gate: jax.Array | None = None,
    activation: Gate | None = None,
) -> NormalisedCodes:
    """``absmax_quantize(norm(act(gate) · x))`` in one pass over a row, in Triton.

    Inner products of a row are float32 sums in an order of their own, and a gated product is not
    rounded before it is normalised; from normalised values on every step rounds as
    ``absmax_quantize`` does.

    Args:
        x: floats [M, K], K at most ``MOST_CHANNELS``.
        gain: [K] of the norm.
        eps: added to the mean of squares.
        gate: of the shape and dtype of ``x``.
        activation: of the gate.

    Raises:
        ValueError: K is too large, or one of gate and activation is missing.
    """
    if x.shape[-1] > MOST_CHANNELS:
        raise ValueError(f"expected at most {MOST_CHANNELS} channels, found {x.shape[-1]}")
    if (gate is None) != (activation is None):
        raise ValueError("a gate needs an activation, and an activation a gate")
    found = cast(_Outputs, _codes(How(activation, eps), x, gate, gain))
    return NormalisedCodes(*found)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _codes(how: How, x: jax.Array, gate: jax.Array | None, gain: jax.Array) -> _Outputs:
    return _forward(how, x, gate, gain)[0]


def _forward(
    how: How, x: jax.Array, gate: jax.Array | None, gain: jax.Array
) -> tuple[_Outputs, _Residuals]:
    call = partial(kernel_module(KERNELS).codes, how)
    codes, scale, inverse = on_platform(call, x, gate, gain)
    return (codes, scale[:, None], jnp.zeros_like(x)), (x, gate, gain, inverse)


def _backward(
    how: How, residuals: _Residuals, cotangents: tuple[Any, Any, jax.Array]
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    x, gate, gain, inverse = residuals
    call = partial(kernel_module(KERNELS).gradient, how)
    dx, d_gate, d_gain = on_platform(call, cotangents[2], x, gate, gain, inverse)
    return dx, d_gate, d_gain.astype(gain.dtype)


_codes.defvjp(_forward, _backward)
