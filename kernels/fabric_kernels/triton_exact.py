"""Steps of a quantiser that must round as IEEE 754 says, in Triton, whose own division does not.

It may also merge a product with what follows; inline PTX is left as it is.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from fabric_kernels.triton_call import Mode


def reciprocal(x: jax.Array, mode: Mode) -> jax.Array:
    """1/x of a float32 vector, correctly rounded."""
    if mode != "cuda":
        return 1.0 / x
    return plgpu.elementwise_inline_asm(
        "rcp.rn.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )[0]


def scalar_reciprocal(x: jax.Array, mode: Mode) -> jax.Array:
    """1/x of one float32."""
    if mode != "cuda":
        return 1.0 / x
    # Triton's inline PTX is for vectors: one of equal numbers.
    return jnp.max(reciprocal(jnp.full((32,), x), mode))


def round_product(x: jax.Array, scale: jax.Array, mode: Mode) -> jax.Array:
    """``rint(x · scale)`` as int32, each step rounded by itself; 0 for what is not a number.

    ``x`` is a float32 vector, ``scale`` is broadcast to it.
    """
    if mode != "cuda":
        product = x * scale
        return jnp.where(jnp.isnan(product), 0.0, jnp.rint(product)).astype(jnp.int32)
    return plgpu.elementwise_inline_asm(
        "{ .reg .f32 t; mul.rn.f32 t, $1, $2; cvt.rni.s32.f32 $0, t; }",
        args=[x, jnp.broadcast_to(scale, x.shape)],
        constraints="=r,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.int32)],
    )[0]
