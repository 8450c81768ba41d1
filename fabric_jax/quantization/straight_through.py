"""Straight-through estimators: quantise in the forward pass, identity in the backward pass.

Both scales count as constants and there is no clipping mask: gradients also flow where a weight
lies beyond the outermost code (as in the released BitNet training code). ``custom_vjp`` keeps the
forward values exactly on the grid, which ``x + stop_gradient(q(x) - x)`` does not.
"""

import jax

from fabric_jax.errors import unknown_name
from fabric_jax.quantization.absmax import (
    ActQuant,
    absmax_fake_quantize,
    block256_fake_quantize,
)
from fabric_jax.quantization.absmean import absmean_fake_quantize


@jax.custom_vjp
def quantize_weight(weight: jax.Array) -> jax.Array:
    """Absmean ternary values of a [n, k] matrix; the gradient passes unchanged."""
    return absmean_fake_quantize(weight)


quantize_weight.defvjp(lambda w: (absmean_fake_quantize(w), None), lambda _, g: (g,))


@jax.custom_vjp
def quantize_activation(x: jax.Array) -> jax.Array:
    """Per-token int8 values of ``x`` [..., k]; the gradient passes unchanged."""
    return absmax_fake_quantize(x)


quantize_activation.defvjp(lambda x: (absmax_fake_quantize(x), None), lambda _, g: (g,))


@jax.custom_vjp
def quantize_activation_block256(x: jax.Array) -> jax.Array:
    """llama.cpp's Q8_K values of ``x`` [..., k]; the gradient passes unchanged."""
    return block256_fake_quantize(x)


quantize_activation_block256.defvjp(lambda x: (block256_fake_quantize(x), None), lambda _, g: (g,))


def fake_quantize_activation(x: jax.Array, act_quant: ActQuant) -> jax.Array:
    """``x`` after the quantiser named by ``act_quant``, straight-through in the backward pass."""
    match act_quant:
        case "per_token":
            return quantize_activation(x)
        case "block256":
            return quantize_activation_block256(x)
        case "none":
            return x
    raise unknown_name("activation quantiser", act_quant, ("per_token", "block256", "none"))
