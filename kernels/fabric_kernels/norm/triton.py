"""RMS norms and gated products on GPUs, forward and backward in one pass over a row each.

XLA reads a row twice in both directions, once for its sum and once for what is made of it.
"""

from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from fabric_kernels.triton_call import Mode, kernel_module, on_platform

MOST_COLUMNS = 16384
"""Of a row, all of which a program has in registers."""


@dataclass(frozen=True)
class How:
    """What is computed.

    Attributes:
        activation: of the gate; None for a norm without one.
        eps: of the norm.
    """

    activation: Literal["silu", "relu2"] | None
    eps: float


def kernels() -> ModuleType:
    """The module of the kernels; as ``kernel_module``."""
    return kernel_module("fabric_kernels.norm.triton_kernels")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def norm(how: How, x: tuple[jax.Array, ...], gain: jax.Array) -> jax.Array:
    """The normalised rows.

    Args:
        how: what is computed.
        x: (x,) or (gate, up), floats [..., n].
        gain: [n].

    Returns:
        [..., n] in the dtype of x. First gradients only, in reverse mode.
    """

    def call(x: tuple[jax.Array, ...], gain: jax.Array, *, mode: Mode) -> jax.Array:
        return kernels().forward(how, _rows(x), wide_gain(gain), mode=mode)

    return on_platform(call, x, gain).reshape(x[0].shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def norm_beside(how: How, x: jax.Array, gain: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The normalised rows of ``x`` [..., n] and ``x`` itself, as :func:`norm` without a gate.

    The gradients by both are added up where the first one is computed.
    """
    return norm(how, (x,), gain), x


_Operands = tuple[tuple[jax.Array, ...], jax.Array]


def _forward(how: How, x: tuple[jax.Array, ...], gain: jax.Array) -> tuple[jax.Array, _Operands]:
    return norm(how, x, gain), (x, gain)


def gradients(
    how: How, operands: _Operands, dy: jax.Array, beside: jax.Array | None = None
) -> _Operands:
    """By rows and gain of :func:`norm`, of ``dy`` [..., n]; ``beside`` is added to that by x."""
    x, gain = operands

    def call(x: Any, gain: jax.Array, *more: Any, mode: Mode) -> Any:
        return kernels().backward(how, _rows(x), wide_gain(gain), *_rows(more), mode=mode)

    found = on_platform(call, x, gain, dy, *(() if beside is None else (beside,)))
    # Of no use where the gain is frozen; the compiler then leaves it out.
    d_gain = jnp.sum((dy.astype(jnp.float32) * _normal(how, x)).reshape(-1, gain.size), axis=0)
    return tuple(d.reshape(dy.shape) for d in found), d_gain.astype(gain.dtype)


norm.defvjp(_forward, gradients)


def _forward_beside(
    how: How, x: jax.Array, gain: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], _Operands]:
    return norm_beside(how, x, gain), ((x,), gain)


def _backward_beside(
    how: How, operands: _Operands, both: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (dx,), d_gain = gradients(how, operands, *both)
    return dx, d_gain


norm_beside.defvjp(_forward_beside, _backward_beside)


def _normal(how: How, x: tuple[jax.Array, ...]) -> jax.Array:
    """The normalised rows without a gain in float32, which XLA makes part of what reads them."""
    product = x[-1].astype(jnp.float32)
    if how.activation is not None:
        gate = x[0].astype(jnp.float32)
        product *= jax.nn.silu(gate) if how.activation == "silu" else jnp.square(jax.nn.relu(gate))
    return product * lax.rsqrt(jnp.mean(product * product, axis=-1, keepdims=True) + how.eps)


def wide_gain(gain: jax.Array) -> jax.Array:
    """In float32, as kernels use it.

    XLA makes a slice of a stack of gains and its conversion one small kernel, which may run beside
    others; the slice alone would be a copy, which waits for its turn on a stream of its own.
    """
    return gain.astype(jnp.float32)


def _rows(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(a.reshape(-1, a.shape[-1]) for a in arrays)
