"""BitNet's arithmetic around a W2A8 product: the quantiser of its input, the scales of its sums.

Every implementation rounds as these functions do, so that equal inputs give equal bits.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int8

EPSILON = 1e-5


def absmax_quantize(
    x: Float[Array, "*batch k"], axis_name: str | tuple[str, ...] | None = None
) -> tuple[Int8[Array, "*batch k"], Float32[Array, "*batch 1"]]:
    """BitNet's per-token int8 quantiser: codes, and the scale that *divides* them.

    ``m = max(max|x|, 1e-5)``, ``s = (1/m)·127``, ``codes = clip(rint(x·s), -128, 127)`` over the
    last axis, in float32, ties to even. The two roundings of ``(1/m)·127`` are those of the
    released code: a true division ``127/m`` gives another scale for a quarter of all inputs.

    Under ``shard_map`` the last axis may be cut along ``axis_name``, one or more axes of
    the mesh: the maximum is then that of all parts, so that codes and scale are those of the whole.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    if axis_name is not None:
        largest = lax.pmax(largest, axis_name)
    largest = jnp.maximum(largest, EPSILON)
    scale = (1.0 / largest) * 127.0
    codes = jnp.clip(jnp.rint(x * scale), -128, 127)
    return codes.astype(jnp.int8), scale


def scale_sums(sums: jax.Array, act_scale: jax.Array, weight_scale: jax.Array) -> jax.Array:
    """``sums · ((1/act_scale) · weight_scale)`` in float32: one multiplication by both scales.

    Args:
        sums: [..., N], products of codes, whole numbers in any dtype.
        act_scale: float32 [..., 1], of :func:`absmax_quantize`.
        weight_scale: float32, [] or one for each output [..., N].
    """
    return rounded(sums.astype(jnp.float32) * ((1.0 / act_scale) * weight_scale))


def rounded(product: jax.Array) -> jax.Array:
    """The same number, rounded before anything is added to it.

    Compilers behind XLA and Triton contract a product and the addition after it to one fused
    multiply-add, across every barrier of XLA's; whether the two meet in one loop depends on the
    implementation. They don't contract across a choice.
    """
    return jnp.where(product != product, jnp.nan, product)
