"""The linear map of a frozen packed matrix, with the gradient that flows through it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from fabric_kernels import ternary_matmul, ternary_matmul_transposed
from fabric_kernels.ternary_matmul import Implementation
from jaxtyping import Array, Float, Float32, UInt8

from fabric_jax.quantization.absmax import ActQuant, absmax_quantize
from fabric_jax.quantization.straight_through import fake_quantize_activation


def packed_linear(
    x: Float[Array, "*batch k"],
    packed: UInt8[Array, "n k/4"],
    scale: Float32[Array, ""],
    *,
    act_quant: ActQuant = "per_token",
    implementation: Implementation | None = None,
) -> Float[Array, "*batch n"]:
    """``scale · (q(x) · codes^T)``, in the dtype of ``x``.

    Per token the product is exact: int8 codes times ternary codes accumulate in int32, and one
    float32 multiplication by both scales follows. Backward: ``dx = scale · (g · codes)``, the
    quantiser counting as identity; the packed matrix and its scale get no gradient.
    """
    if act_quant == "per_token":
        return _int8_linear(implementation, x, packed, scale)
    values = fake_quantize_activation(x, act_quant)
    product = ternary_matmul(values, packed, implementation=implementation)
    return (product.astype(jnp.float32) * jax.lax.stop_gradient(scale)).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _int8_linear(
    implementation: Implementation | None, x: jax.Array, packed: jax.Array, scale: jax.Array
) -> jax.Array:
    codes, act_scale = absmax_quantize(x)
    product = ternary_matmul(codes, packed, implementation=implementation)
    return (product.astype(jnp.float32) / act_scale * scale).astype(x.dtype)


def _int8_linear_fwd(
    implementation: Implementation | None, x: jax.Array, packed: jax.Array, scale: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    # Of x only its width is needed again, which an empty array carries.
    residuals = (packed, scale, jnp.zeros((0, x.shape[-1]), x.dtype))
    return _int8_linear(implementation, x, packed, scale), residuals


def _int8_linear_bwd(
    implementation: Implementation | None,
    residuals: tuple[jax.Array, jax.Array, jax.Array],
    g: jax.Array,
) -> tuple[jax.Array, np.ndarray, jax.Array]:
    packed, scale, like = residuals
    scaled = (g.astype(jnp.float32) * scale).astype(g.dtype)
    dx = ternary_matmul_transposed(scaled, packed, like.shape[-1], implementation=implementation)
    return dx, np.zeros(packed.shape, jax.dtypes.float0), jnp.zeros_like(scale)


_int8_linear.defvjp(_int8_linear_fwd, _int8_linear_bwd)
