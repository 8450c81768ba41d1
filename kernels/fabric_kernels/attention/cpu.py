"""The CPU implementation: kernels of ``csrc`` called by XLA through its foreign function interface.

They read and write heads where they lie, so that nothing is transposed, and hold no more than 32
rows of scores a thread. The backward call computes the weights anew from its inputs, so nothing but
these is kept for it. Results do not depend on the number of threads.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from fabric_kernels import cpu_library

# q, k, v, mask, cos, sin; the last two empty without rotary positions
Inputs = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def attention(inputs: Inputs, scale: float) -> jax.Array:
    """The output in the dtype of q; computed in float32."""
    cpu_library.load()
    return _attention(scale, *inputs)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    scale: float,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
) -> jax.Array:
    return _forward(scale)(*_floats(q, k, v), mask, cos, sin).astype(q.dtype)


def _attention_fwd(scale: float, *inputs: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _attention(scale, *inputs), inputs


def _attention_bwd(
    scale: float, inputs: Inputs, g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, None, None]:
    q, k, v, *rest = inputs
    gradients = _backward(scale)(*_floats(q, k, v), *rest, g.astype(jnp.float32))
    dq, dk, dv = (d.astype(x.dtype) for d, x in zip(gradients, (q, k, v), strict=True))
    return dq, dk, dv, None, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _floats(*arrays: jax.Array) -> list[jax.Array]:
    return [array.astype(jnp.float32) for array in arrays]


def _forward(scale: float) -> Callable[..., jax.Array]:
    def call(q: jax.Array, *rest: jax.Array) -> jax.Array:
        out = jax.ShapeDtypeStruct(q.shape, jnp.float32)
        return jax.ffi.ffi_call("fabric_attention", out)(q, *rest, scale=np.float32(scale))

    return _batch_fold(call)


def _backward(scale: float) -> Callable[..., Sequence[jax.Array]]:
    def call(q: jax.Array, k: jax.Array, v: jax.Array, *rest: jax.Array) -> Sequence[jax.Array]:
        out = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (q, k, v)]
        return jax.ffi.ffi_call("fabric_attention_transposed", out)(
            q, k, v, *rest, scale=np.float32(scale)
        )

    return _batch_fold(call)


def _batch_fold(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` with a rule for ``vmap``: a mapped axis makes the batch larger."""
    mapped = custom_vmap(call)

    def rule(size: int, batched: Sequence[bool], *arguments: jax.Array) -> tuple[Any, Any]:
        full = [
            a if own else jnp.broadcast_to(a, (size, *a.shape))
            for a, own in zip(arguments, batched, strict=True)
        ]
        batch = full[0].shape[1]
        out = mapped(*(a.reshape(size * batch, *a.shape[2:]) for a in full))
        out = jax.tree.map(lambda a: a.reshape(size, batch, *a.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    mapped.def_vmap(rule)
    return mapped
