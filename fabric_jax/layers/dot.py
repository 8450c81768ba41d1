"""The dense products of the layers."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


def linear(x: jax.Array, weight: jax.Array, out_dtype: DTypeLike | None = None) -> jax.Array:
    """``x[..., k] · weight[n, k]^T``, summed in float32 at least.

    The weight is cast to the dtype of ``x``. Float32 operands are multiplied as float32 on every
    device: accelerators would otherwise round them to TF32 or bfloat16.
    """
    return _dot(x, weight, 1).astype(out_dtype or x.dtype)


def linear_transposed(x: jax.Array, weight: jax.Array) -> jax.Array:
    """``x[..., n] · weight[n, k]``, otherwise as :func:`linear`."""
    return _dot(x, weight, 0).astype(x.dtype)


def _dot(x: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
    return lax.dot_general(
        x,
        weight.astype(x.dtype),
        (((x.ndim - 1,), (axis,)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
