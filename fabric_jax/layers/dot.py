"""The dense product of the layers."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


def linear(x: jax.Array, weight: jax.Array, out_dtype: DTypeLike | None = None) -> jax.Array:
    """``x[..., k] · weight[n, k]^T``, summed in float32 at least.

    The weight is cast to the dtype of ``x``. Float32 operands are multiplied as float32 on every
    device: accelerators would otherwise round them to TF32 or bfloat16.
    """
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    contract = (((x.ndim - 1,), (weight.ndim - 1,)), ((), ()))
    product = lax.dot_general(
        x,
        weight.astype(x.dtype),
        contract,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return product.astype(out_dtype or x.dtype)
