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
