"""Rows of a batch that are cut along a mesh."""

import jax
from jax import lax

from fabric_jax.parallel.axes import RULES
from fabric_jax.parallel.mesh import MeshShape


def bernoulli_of_rows(
    key: jax.Array, p: float, shape: tuple[int, ...], mesh: MeshShape
) -> jax.Array:
    """This device's rows of what one device would draw for all rows: bool of ``shape``.

    A random bit is a function of key and index, so that XLA computes the rows that are cut out
    alone.

    Args:
        key: the same on all devices.
        p: probability of true.
        shape: [rows, ...] of this device.
        mesh: what the rows are cut along.
    """
    if mesh.row_shards == 1:
        return jax.random.bernoulli(key, p, shape)
    whole = jax.random.bernoulli(key, p, (mesh.row_shards * shape[0], *shape[1:]))
    start = lax.axis_index(RULES["rows"]) * shape[0]
    return lax.dynamic_slice_in_dim(whole, start, shape[0])
