"""BitNet's quantiser of activations: the input of every W2A8 product."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8

EPSILON = 1e-5


def absmax_quantize(
    x: Float[Array, "*batch k"],
) -> tuple[Int8[Array, "*batch k"], Float32[Array, "*batch 1"]]:
    """BitNet's per-token int8 quantiser: codes, and the scale that *divides* them.

    ``m = max(max|x|, 1e-5)``, ``s = (1/m)·127``, ``codes = clip(rint(x·s), -128, 127)`` over the
    last axis, in float32, ties to even. The two roundings of ``(1/m)·127`` are those of the
    released code: a true division ``127/m`` gives another scale for a quarter of all inputs.
    """
    x = x.astype(jnp.float32)
    largest = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), EPSILON)
    scale = (1.0 / largest) * 127.0
    codes = jnp.clip(jnp.rint(x * scale), -128, 127)
    return codes.astype(jnp.int8), scale
