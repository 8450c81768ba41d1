"""Updates of weights that are stored in bfloat16, rounded up or down at random.

A bfloat16 has 8 significant bits, so an update below 2^-9 of a weight is lost when the sum is
rounded to nearest, however often it comes. Rounded to either neighbour with a probability that
falls with the distance, the sum is right in expectation (Gupta et al. 2015, arXiv:1502.02551).
"""

import zlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float32

from fabric_jax.models.initialize import Tree

ROUNDING_STREAM = zlib.crc32(b"rounding")
"""Folded into the key of a step; its dropout folds in micro-batches and layers, small numbers."""


def stochastic_round(x: Float32[Array, "..."], dtype: DTypeLike, key: jax.Array) -> jax.Array:
    """``x`` as bfloat16, rounded so that the expected result is ``x``.

    A bfloat16 is the upper half of a float32. A random number of 16 bits, added to the lower half,
    carries into the upper one with the probability that the lower half is a fraction of; then the
    lower half is dropped. Values that a bfloat16 holds stay as they are, infinities and NaN too.
    Beyond its largest number the upper neighbour is infinity, as in rounding to nearest.

    Args:
        x: float32, any shape.
        dtype: bfloat16.
        key: of the random bits; one key gives the same result every time.

    Raises:
        TypeError: the dtypes are others.
    """
    if x.dtype != jnp.float32 or jnp.dtype(dtype) != jnp.bfloat16:
        raise TypeError(f"stochastic_round takes float32 to bfloat16, found {x.dtype} to {dtype}")
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = lax.bitcast_convert_type(x, jnp.uint32) + noise
    upper = lax.shift_right_logical(bits, jnp.uint32(16)).astype(jnp.uint16)
    rounded = lax.bitcast_convert_type(upper, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def apply_updates(
    params: Tree, updates: Tree, key: jax.Array, *, layer: jax.Array | None = None
) -> Tree:
    """``params + updates`` in the dtypes of ``params``; bfloat16 leaves are rounded at random.

    The key of a leaf is ``key`` folded with its path and, below ``layers``, with each layer: a
    stack that is updated at once becomes what its layers become one by one.

    Args:
        params: leaves below ``layers`` have a leading axis of layers, unless ``layer`` is given.
        updates: float32, of the same shapes.
        key: of the step.
        layer: int32 [], where the trees are those of one layer.
    """
    root = jax.random.fold_in(key, ROUNDING_STREAM)

    def leaf(path: tuple[Any, ...], p: jax.Array, u: jax.Array) -> jax.Array:
        total = p.astype(u.dtype) + u
        if p.dtype != jnp.bfloat16:
            return total.astype(p.dtype)
        names = [str(part.key) for part in path]
        own = jax.random.fold_in(root, zlib.crc32("/".join(names).encode()))
        rounded = partial(stochastic_round, dtype=p.dtype)
        if layer is not None:
            return rounded(total, key=jax.random.fold_in(own, layer))
        if names[0] != "layers":
            return rounded(total, key=own)
        layers = jnp.arange(p.shape[0], dtype=jnp.int32)
        keys = jax.vmap(partial(jax.random.fold_in, own))(layers)
        return jax.vmap(lambda x, k: rounded(x, key=k))(total, keys)

    return jax.tree_util.tree_map_with_path(leaf, params, updates)
