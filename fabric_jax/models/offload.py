"""A scan over layers whose inputs wait in the host's memory for the backward pass.

Chen et al. 2016, arXiv:1604.06174, keep the input of each layer and compute the rest anew. Here
those inputs are out of the device's memory meanwhile. Copies run beside the computation: a layer's
input leaves while the layer is computed, and comes back while the layer above is differentiated.
The last layer is differentiated first: what it would compute anew it keeps, and what the one before
it read comes back beside its forward pass and the loss.
"""

from collections.abc import Callable
from dataclasses import dataclass
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

    The gradients are those of ``jax.checkpoint(layer)`` in a scan; the last layer's intermediate
    arrays are on the device from its forward pass to its backward pass. Not under ``vmap``.

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
@dataclass(frozen=True, kw_only=True)
class _Trained:
    """Which leaves of a tree a gradient is wanted for."""

    tree: Any
    leaves: tuple[bool, ...]

    def part(self, tree: Any) -> tuple[list[Any], list[Any]]:
        """The leaves with a gradient, and the others."""
        pairs = list(zip(self.leaves, jax.tree.leaves(tree), strict=True))
        return [leaf for own, leaf in pairs if own], [leaf for own, leaf in pairs if not own]

    def join(self, own: list[Any], rest: list[Any]) -> Any:
        """The tree of both."""
        first, second = iter(own), iter(rest)
        leaves = [next(first if mine else second) for mine in self.leaves]
        return jax.tree.unflatten(self.tree, leaves)


def _forward(
    layer: Layer, unroll: bool, h: Any, xs: Any, consts: Any
) -> tuple[jax.Array, tuple[Any, ...]]:
    leaves, tree = jax.tree.flatten(xs, is_leaf=_is_primal)
    trained = _Trained(tree=tree, leaves=tuple(leaf.perturbed for leaf in leaves))
    h, consts = jax.tree.map(lambda leaf: leaf.value, (h, consts), is_leaf=_is_primal)
    xs = jax.tree.unflatten(tree, [leaf.value for leaf in leaves])

    def body(carry: tuple[jax.Array, jax.Array], x: Any) -> tuple[Any, jax.Array]:
        h, i = carry
        return (layer(h, i, x, consts), i + 1), jax.device_put(h, jax.memory.Space.Host)

    before, last = jax.tree.map(lambda x: x[:-1], xs), jax.tree.map(lambda x: x[-1], xs)
    (h, i), inputs = lax.scan(body, (h, jnp.int32(0)), before, unroll=unroll)
    own, rest = trained.part(last)
    h, last_backward = jax.vjp(lambda h, own: layer(h, i, trained.join(own, rest), consts), h, own)
    return h, (inputs, last_backward, before, consts, trained)


def _backward(
    layer: Layer, unroll: bool, residuals: tuple[Any, ...], dh: jax.Array
) -> tuple[jax.Array, Any, None]:
    inputs, last_backward, before, consts, trained = residuals
    if isinstance(dh, jax.custom_derivatives.SymbolicZero):
        dh = jnp.zeros(dh.shape, dh.dtype)
    dh, of_last = last_backward(dh)
    stacks, rest = trained.part(before)
    last = inputs.shape[0]
    gradients = [jnp.zeros((last + 1, *g.shape), g.dtype).at[last].set(g) for g in of_last]
    if not last:
        return dh, trained.join(gradients, [None] * len(rest)), None

    def differentiate(index: jax.Array, dh: jax.Array, h: jax.Array, gradients: list[Any]) -> Any:
        own, fixed = ([_at(stack, index) for stack in part] for part in (stacks, rest))

        def again(h: jax.Array, own: list[Any]) -> jax.Array:
            return layer(h, index, trained.join(own, fixed), consts)

        dh, by_own = jax.vjp(again, h, own)[1](dh)
        put = partial(lax.dynamic_update_index_in_dim, index=index, axis=0)
        return dh, [put(*pair) for pair in zip(gradients, by_own, strict=True)]

    # Where an input lies must be a linear function of the loop's counter, and within the stack,
    # for XLA to copy it without a kernel: so the first layer is no turn of the loop.
    def turn(i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        dh, h, gradients = carry
        below = jax.device_put(_at(inputs, last - 2 - i), jax.memory.Space.Device)
        dh, gradients = differentiate(last - 1 - i, dh, h, gradients)
        return dh, below, gradients

    h = jax.device_put(inputs[-1], jax.memory.Space.Device)
    carry = lax.fori_loop(0, last - 1, turn, (dh, h, gradients), unroll=unroll)
    dh, gradients = differentiate(jnp.int32(0), *carry)
    return dh, trained.join(gradients, [None] * len(rest)), None


_scan.defvjp(_forward, _backward, symbolic_zeros=True)


def _is_primal(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)


def _at(stack: jax.Array, index: Any) -> jax.Array:
    """One layer's slice."""
    return lax.dynamic_index_in_dim(stack, index, keepdims=False, allow_negative_indices=False)
