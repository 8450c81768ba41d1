"""The product of XLA that every path ends in."""

import jax
import jax.numpy as jnp
from jax import lax


def dot(x: jax.Array, table: jax.Array, axis: int) -> jax.Array:
    """``x[..., C]`` contracted with ``axis`` of a table of two axes: float32 sums.

    The table is cast to the dtype of ``x``; float32 is multiplied as such, not as something less.
    """
    return lax.dot_general(
        x,
        table.astype(x.dtype),
        (((x.ndim - 1,), (axis,)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def row_product(x: jax.Array, table: jax.Array) -> jax.Array:
    """:func:`dot` of one row [..., K] with the last axis of a table, as a multiplication and a sum.

    On an accelerator XLA makes one kernel of it, whatever the table's values are computed from, and
    no array of them.
    """
    row = x.reshape(x.shape[-1]).astype(jnp.float32)
    values = table.astype(x.dtype).astype(jnp.float32)
    return jnp.sum(values * row[None], axis=-1).reshape(*x.shape[:-1], -1)
