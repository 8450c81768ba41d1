"""Norms and gates in one pass over a row, where XLA takes several, and on CPU on one thread.

RMSNorm: Zhang and Sennrich 2019, arXiv:1910.07467. Squared ReLU: So et al. 2021, arXiv:2109.08668.
"""

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fabric_kernels import cpu_library
from fabric_kernels.norm import triton
from fabric_kernels.nvidia import AMPERE, compute_capability

Implementation = Literal["xla", "cpu", "triton"]
Gate = Literal["silu", "relu2"]
GATES: dict[Gate | None, np.int32] = {
    None: np.int32(0),
    "silu": np.int32(1),
    "relu2": np.int32(2),
}
MANY_ROWS = 1024
"""From so many on ``None`` means the Triton kernels, in half precision on an NVIDIA GPU
that has bfloat16: XLA has few rows in its caches, and joins norms with what is around them."""


def rms_norm(
    x: jax.Array, gain: jax.Array, eps: float, *, implementation: Implementation | None = None
) -> jax.Array:
    """``x · rsqrt(mean(x²) + eps)`` over the last axis in float32, cast back, times the gain.

    Args:
        x: [..., n], floats.
        gain: [n], floats; cast to the dtype of ``x``.
        eps: added to the mean of squares.
        implementation: ``cpu``, ``triton`` or ``xla``; None picks. The CPU kernel is for float32:
            other dtypes are left to XLA under its name.
    """
    if on_triton(x, implementation):
        return triton.norm(triton.How(None, eps), (x,), gain)
    if _on_cpu(x, implementation):
        empty = jnp.zeros((0,), jnp.float32)
        return _cpu((None, eps), x, empty, gain.astype(jnp.float32))
    return _normalise(x, gain, eps)


def rms_norm_beside(
    x: jax.Array, gain: jax.Array, eps: float, *, implementation: Implementation | None = None
) -> tuple[jax.Array, jax.Array]:
    """:func:`rms_norm`, and ``x`` itself for what else reads it.

    The gradient by ``x`` then has two parts, which Triton's kernel adds up on the way, in float32.
    """
    if on_triton(x, implementation):
        return triton.norm_beside(triton.How(None, eps), x, gain)
    return rms_norm(x, gain, eps, implementation=implementation), x


def gated_product(
    gate: jax.Array,
    up: jax.Array,
    activation: Gate,
    gain: jax.Array | None = None,
    eps: float = 0.0,
    *,
    implementation: Implementation | None = None,
) -> jax.Array:
    """``act(gate) · up``, [..., n], and its RMS norm where there is a gain [n].

    ``implementation`` as for :func:`rms_norm`; without a gain ``triton`` is XLA's too.
    """
    if gain is not None and on_triton(gate, implementation):
        return triton.norm(triton.How(activation, eps), (gate, up), gain)
    if _on_cpu(gate, implementation):
        own = jnp.zeros((0,), jnp.float32) if gain is None else gain.astype(jnp.float32)
        return _cpu((activation, eps), gate, up, own)
    product = activate(gate, activation) * up
    return product if gain is None else _normalise(product, gain, eps)


def activate(x: jax.Array, activation: Gate | None) -> jax.Array:
    """``silu(x)`` or ``max(x, 0)²``."""
    return jax.nn.silu(x) if activation == "silu" else jnp.square(jax.nn.relu(x))


def _normalise(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    normal = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return normal.astype(x.dtype) * jnp.expand_dims(gain, range(x.ndim - 1)).astype(x.dtype)


def on_triton(x: jax.Array, implementation: Implementation | None = None) -> bool:
    """Whether norms of ``x`` [..., n] are Triton's."""
    if implementation is not None or x.shape[-1] > triton.MOST_COLUMNS or x.size == 0:
        return implementation == "triton" and x.size > 0
    if x.dtype.itemsize > 2 or x.size < MANY_ROWS * x.shape[-1]:
        return False
    return compute_capability() >= AMPERE


def _on_cpu(x: jax.Array, implementation: Implementation | None) -> bool:
    if implementation is None:
        known = x.dtype == jnp.float32 and jax.default_backend() == "cpu"
        implementation = "cpu" if known and cpu_library.available() else "xla"
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"norms have the implementations {', '.join(get_args(Implementation))}; "
            f"found {implementation!r}"
        )
    if implementation == "cpu":
        cpu_library.load()
    return implementation == "cpu" and x.dtype == jnp.float32


_How = tuple[Gate | None, float]
_Operands = tuple[jax.Array, jax.Array, jax.Array]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cpu(how: _How, x: jax.Array, up: jax.Array, gain: jax.Array) -> jax.Array:
    out = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    call = jax.ffi.ffi_call("fabric_norm", out, vmap_method="sequential")
    return call(x, up, gain, gate=GATES[how[0]], eps=np.float32(how[1]))


def _cpu_fwd(
    how: _How, x: jax.Array, up: jax.Array, gain: jax.Array
) -> tuple[jax.Array, _Operands]:
    return _cpu(how, x, up, gain), (x, up, gain)


def _cpu_bwd(how: _How, operands: _Operands, dy: jax.Array) -> _Operands:
    x, up, gain = operands
    shapes = [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in (x, up)]
    call = jax.ffi.ffi_call("fabric_norm_gradient", shapes, vmap_method="sequential")
    dx, d_up = call(x, up, gain, dy, gate=GATES[how[0]], eps=np.float32(how[1]))
    # Of no use where the gain is frozen; the compiler then leaves it out.
    if gain.size == 0:
        return dx, d_up, gain
    product = x if how[0] is None else activate(x, how[0]) * up
    normal = _normalise(product, jnp.ones_like(gain), how[1])
    return dx, d_up, jnp.sum((dy * normal).reshape(-1, gain.size), axis=0)


_cpu.defvjp(_cpu_fwd, _cpu_bwd)
