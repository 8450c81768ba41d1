"""A scan over layers whose inputs wait in the host's memory for the backward pass.

Chen et al. 2016, arXiv:1604.06174, keep the input of each layer and compute the rest anew. Here
those inputs are out of the device's memory meanwhile. Copies run beside the computation: a layer's
input leaves while the layer is computed, and comes back while the layer above is differentiated.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Layer = Callable[[jax.Array, jax.Array, Any, Any], jax.Array]
COMPILER_OPTIONS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL"
}
"""For programs with such a scan on a CUDA GPU: all that XLA records in graphs by itself, except
copies of slices. Within a graph they would not run beside the computation (jax 0.11.2)."""


def scan_offloaded(layer: Layer, h: jax.Array, xs: Any, consts: Any, *, unroll: bool) -> jax.Array:
    """``h = layer(h, i, x, consts)`` for each ``x`` of ``xs``; first gradients, in reverse mode.

    The gradients are those of ``jax.checkpoint(layer)`` in a scan.

    Args:
        layer: of arrays that are all among its arguments; ``i`` int32 [] counts from 0.
        h: what goes through all layers, of one shape and dtype.
        xs: a tree of arrays [L, ...], L at least 1, differentiated where they are floats.
        consts: a tree of arrays that every layer reads; not differentiated.
        unroll: write the layers out one after another.

    Returns:
        The last ``h``.
    """
    # It is called in several places, and traced in one.
    return _scan(jax.jit(layer), unroll, h, xs, consts)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(layer: Layer, unroll: bool, h: jax.Array, xs: Any, consts: Any) -> jax.Array:
    def body(carry: tuple[jax.Array, jax.Array], x: Any) -> tuple[Any, None]:
        h, i = carry
        return (layer(h, i, x, consts), i + 1), None

    return lax.scan(body, (h, jnp.int32(0)), xs, unroll=unroll)[0][0]


@jax.tree_util.register_static
class _Trained(tuple[bool, ...]):
    """Which leaves of ``xs`` a gradient is wanted for."""


def _forward(
    layer: Layer, unroll: bool, h: Any, xs: Any, consts: Any
) -> tuple[jax.Array, tuple[Any, ...]]:
    leaves, tree = jax.tree.flatten(xs, is_leaf=_is_primal)
    trained = _Trained(leaf.perturbed for leaf in leaves)
    h, consts = jax.tree.map(lambda leaf: leaf.value, (h, consts), is_leaf=_is_primal)
    xs = jax.tree.unflatten(tree, [leaf.value for leaf in leaves])

    def body(carry: tuple[jax.Array, jax.Array], x: Any) -> tuple[Any, jax.Array]:
        h, i = carry
        return (layer(h, i, x, consts), i + 1), jax.device_put(h, jax.memory.Space.Host)

    # What the last layer reads is wanted first.
    before, last = jax.tree.map(lambda x: x[:-1], xs), jax.tree.map(lambda x: x[-1], xs)
    (h, i), inputs = lax.scan(body, (h, jnp.int32(0)), before, unroll=unroll)
    return layer(h, i, last, consts), (h, inputs, xs, consts, trained)


def _backward(
    layer: Layer, unroll: bool, residuals: tuple[Any, ...], dh: jax.Array
) -> tuple[jax.Array, Any, None]:
    h, inputs, xs, consts, trained = residuals
    if isinstance(dh, jax.custom_derivatives.SymbolicZero):
        dh = jnp.zeros(dh.shape, dh.dtype)
    leaves, tree = jax.tree.flatten(xs)
    own = [leaf for leaf, mine in zip(leaves, trained, strict=True) if mine]
    rest = [leaf for leaf, mine in zip(leaves, trained, strict=True) if not mine]

    def differentiate(index: jax.Array, dh: jax.Array, h: jax.Array, gradients: list[Any]) -> Any:
        now, fixed = ([_at(stack, index) for stack in stacks] for stacks in (own, rest))

        def again(h: jax.Array, now: list[Any]) -> jax.Array:
            return layer(h, index, _joined(tree, trained, now, fixed), consts)

        dh, by_now = jax.vjp(again, h, now)[1](dh)
        put = partial(lax.dynamic_update_index_in_dim, index=index, axis=0)
        return dh, [put(*pair) for pair in zip(gradients, by_now, strict=True)]

    # Where an input lies must be a linear function of the loop's counter, and within the stack,
    # for XLA to copy it without a kernel: so the first layer is no turn of the loop.
    def turn(i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        dh, h, gradients = carry
        before = jax.device_put(_at(inputs, last - 1 - i), jax.memory.Space.Device)
        dh, gradients = differentiate(last - i, dh, h, gradients)
        return dh, before, gradients

    last = inputs.shape[0]
    carry: Any = (dh, h, [jnp.zeros_like(leaf) for leaf in own])
    if last:
        carry = lax.fori_loop(0, last, turn, carry, unroll=unroll)
    dh, gradients = differentiate(jnp.int32(0), *carry)
    return dh, _joined(tree, trained, gradients, [None] * len(rest)), None


_scan.defvjp(_forward, _backward, symbolic_zeros=True)


def _is_primal(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)


def _at(stack: jax.Array, index: Any) -> jax.Array:
    """One layer's slice."""
    return lax.dynamic_index_in_dim(stack, index, keepdims=False, allow_negative_indices=False)


def _joined(tree: Any, trained: _Trained, own: list[Any], rest: list[Any]) -> Any:
    """The tree of both kinds of leaves."""
    first, second = iter(own), iter(rest)
    return jax.tree.unflatten(tree, [next(first if mine else second) for mine in trained])
