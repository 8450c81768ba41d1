"""Master weights that are cut along a mesh; called within ``shard_map``."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from fabric_jax.parallel.axes import Cut
from fabric_jax.parallel.mesh import FSDP
from fabric_jax.quantization.absmean import EPSILON


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def quantize_parts(cut: Cut, weight: jax.Array) -> jax.Array:
    """Absmean ternary values of the whole matrix [N, K], from this device's part of it.

    The mean is that of all parts, and what is gathered are int8 codes. Backward, straight through:
    each device gets the gradient of its part, summed over the rows of the axis ``fsdp`` where the
    matrix is cut along it.
    """
    return _quantize(cut, weight)


def _quantize(cut: Cut, weight: jax.Array) -> jax.Array:
    axes = tuple(name for name in cut.axes if name is not None)
    wide = weight.astype(jnp.float32)
    total = lax.psum(jnp.sum(jnp.abs(wide)), axes)
    count = weight.size * lax.axis_size(axes)
    reciprocal = 1.0 / jnp.maximum(total / count, EPSILON)
    codes = jnp.clip(jnp.rint(wide * reciprocal), -1, 1).astype(jnp.int8)
    codes = _gather(cut, codes)
    return (codes.astype(jnp.float32) / reciprocal).astype(weight.dtype)


def _forward(cut: Cut, weight: jax.Array) -> tuple[jax.Array, None]:
    return _quantize(cut, weight), None


def _backward(cut: Cut, _: None, g: jax.Array) -> tuple[jax.Array]:
    for axis, name in enumerate(cut.axes):
        if name == FSDP:
            g = lax.psum_scatter(g, name, scatter_dimension=axis, tiled=True)
        elif name is not None:
            size = g.shape[axis] // lax.axis_size(name)
            g = lax.dynamic_slice_in_dim(g, lax.axis_index(name) * size, size, axis)
    return (g,)


quantize_parts.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def gather_parts(cut: Cut, weight: jax.Array) -> jax.Array:
    """The whole matrix [N, K], for variants of the quantiser; backward as :func:`quantize_parts`.

    What is gathered are the masters themselves, four times the bytes of codes.
    """
    return _gather(cut, weight)


def _gather(cut: Cut, weight: jax.Array) -> jax.Array:
    for axis, name in enumerate(cut.axes):
        if name is not None:
            weight = lax.all_gather(weight, name, axis=axis, tiled=True)
    return weight


gather_parts.defvjp(lambda cut, weight: (_gather(cut, weight), None), _backward)
