"""BitNet's quantiser of activations: the input of every W2A8 product."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int8

EPSILON = 1e-5


def absmax_quantize(
    x: Float[Array, "*batch k"], axis_name: str | None = None
) -> tuple[Int8[Array, "*batch k"], Float32[Array, "*batch 1"]]:
    """BitNet's per-token int8 quantiser: codes, and the scale that *divides* them.

    ``m = max(max|x|, 1e-5)``, ``s = (1/m)·127``, ``codes = clip(rint(x·s), -128, 127)`` over the
    last axis, in float32, ties to even. The two roundings of ``(1/m)·127`` are those of the
    released code: a true division ``127/m`` gives another scale for a quarter of all inputs.

    Under ``shard_map`` the last axis may be cut along the mesh axis ``axis_name``: the maximum is
    then that of all parts, so that codes and scale are those of the whole.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    if axis_name is not None:
        largest = lax.pmax(largest, axis_name)
    largest = jnp.maximum(largest, EPSILON)
    scale = (1.0 / largest) * 127.0
    codes = jnp.clip(jnp.rint(x * scale), -128, 127)
    return codes.astype(jnp.int8), scale
