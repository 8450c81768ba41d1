"""The linear map of a master weight: quantised in every forward pass, trained straight through.

Where both operands are codes with scales, the product is of codes: exact sums, then one float32
multiplication by both scales, as the packed linear computes it. So packing a trained model changes
no output, in any dtype of activations. Backward, ``dx = g · W^`` and ``dW = g^T · x^`` with both
scales constant (``bitnet`` of transformers; Bengio et al. 2013, arXiv:1308.3432).
"""

from functools import partial
from typing import Literal, cast

import jax
import jax.numpy as jnp
from fabric_kernels import scale_sums
from jax import lax
from jaxtyping import Array, Float, Float32

from fabric_jax.quantization.absmax import ActQuant, absmax_quantize
from fabric_jax.quantization.absmean import EPSILON
from fabric_jax.quantization.hadamard import hadamard_transform
from fabric_jax.quantization.ste_options import GROUP, SteOptions
from fabric_jax.quantization.straight_through import fake_quantize_activation

CLOSING = ("o", "down")
"""Linears that close a block; the inputs of the others leave a norm of the residual stream."""
KEPT_SHARE = 0.5
"""Of the inputs of o under ``int4-hybrid``."""


def master_linear(
    x: Float[Array, "*batch k"],
    weight: Float32[Array, "n k"],
    *,
    name: str = "",
    act_quant: ActQuant = "per_token",
    ste: SteOptions | None = None,
    key: jax.Array | None = None,
    strength: Float32[Array, ""] | None = None,
) -> Float[Array, "*batch n"]:
    """``q(x) · q(W)^T`` in the dtype of ``x``.

    Args:
        x: inputs.
        weight: master weights.
        name: of the linear (q, k, v, o, gate, up, down), for variants that tell them apart.
        act_quant: quantiser of the inputs.
        ste: variant; None for BitNet b1.58's own rule.
        key: for stochastic rounding; None rounds to nearest.
        strength: lambda of a gradual quantisation: operands are ``v + lambda · (q(v) - v)`` below
            1, and exactly ``q(v)`` from there (the warm-up of HF1BitLLM's conversions). None for 1.
    """
    ste = ste or SteOptions()
    x = turned_input(x, name, ste)
    if ste.weights == "none":
        return _plain(x, weight)
    codes_only = act_quant == "per_token" and ste.weight_scale != "group"

    def whole(x: jax.Array, weight: jax.Array) -> jax.Array:
        if codes_only:
            return _of_codes(x, weight, name, ste, key)
        return _mixed(x, weight, name, act_quant, ste, key, jnp.float32(1))

    if strength is None:
        return whole(x, weight)
    mixed = partial(_mixed, name=name, act_quant=act_quant, ste=ste, key=key, strength=strength)
    return lax.cond(strength >= 1, whole, mixed, x, weight)


def turned_input(
    x: Float[Array, "*batch k"], name: str, ste: SteOptions
) -> Float[Array, "*batch k"]:
    """What is quantised: the Hadamard transform of ``x`` where the variant says so."""
    return hadamard_transform(x) if ste.hadamard and name in CLOSING else x


def weight_codes(
    weight: Float[Array, "n k"], ste: SteOptions, key: jax.Array | None = None
) -> tuple[Float32[Array, "n k"], Float32[Array, "..."]]:
    """Codes -1, 0, 1 as float32, and the scale that multiplies them, which broadcasts to [n, k].

    As ``absmean_quantize`` where the variant is BitNet's own.
    """
    weight = weight.astype(jnp.float32)
    n, k = weight.shape
    reciprocal = 1.0 / _absmean(weight, ste)
    if ste.weight_scale == "group":
        reciprocal = jnp.repeat(
            reciprocal, GROUP, axis=1, total_repeat_length=-(-k // GROUP) * GROUP
        )
        reciprocal = reciprocal[:, :k]
    scaled = weight * reciprocal
    if ste.weight_rounding == "stochastic" and key is not None:
        rounded = jnp.floor(scaled + jax.random.uniform(key, (n, k)))
    else:
        rounded = jnp.rint(scaled)
    return jnp.clip(rounded, -1, 1), 1.0 / reciprocal


def activation_codes(
    x: Float[Array, "*batch k"], name: str, ste: SteOptions
) -> tuple[Float32[Array, "*batch k"], Float32[Array, "*batch 1"]]:
    """Integer codes as float32 and the scale that divides them, per token."""
    if ste.activations == "int8":
        codes, scale = absmax_quantize(x)
        return codes.astype(jnp.float32), scale
    if name in CLOSING:
        values = _largest_share(x, KEPT_SHARE) if name == "o" else x
        codes, scale = absmax_quantize(values)
        return codes.astype(jnp.float32), scale
    # Equation 3 of arXiv:2411.04965: clip(rint(sqrt(7) / mean|x| · x), -8, 7).
    wide = x.astype(jnp.float32)
    scale = jnp.sqrt(7.0) / (jnp.mean(jnp.abs(wide), axis=-1, keepdims=True) + EPSILON)
    return jnp.clip(jnp.rint(wide * scale), -8, 7), scale


def _absmean(weight: jax.Array, ste: SteOptions) -> jax.Array:
    """``max(mean|W|, 1e-5)`` by tensor [], channel [n, 1] or group [n, ceil(k / 128)]."""
    size = jnp.abs(weight)
    match ste.weight_scale:
        case "tensor":
            mean = jnp.mean(size)
        case "channel":
            mean = jnp.mean(size, axis=1, keepdims=True)
        case "group":
            k = size.shape[1]
            groups = jnp.pad(size, ((0, 0), (0, -k % GROUP))).reshape(len(size), -1, GROUP)
            counts = jnp.minimum(GROUP, k - GROUP * jnp.arange(groups.shape[1]))
            mean = jnp.sum(groups, axis=-1) / counts.astype(jnp.float32)[None]
    return jnp.maximum(mean, EPSILON)


def _largest_share(x: jax.Array, share: float) -> jax.Array:
    """``x`` with all but the largest magnitudes of each token set to zero; ties are kept."""
    size = jnp.abs(x)
    kept = max(1, round(share * x.shape[-1]))
    threshold = jnp.sort(size, axis=-1)[..., -kept, None]
    return jnp.where(size >= threshold, x, jnp.zeros((), x.dtype))


_How = tuple[Literal["float", "int8", "packed"], bool]
_Codes = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _of_codes(
    x: jax.Array, weight: jax.Array, name: str, ste: SteOptions, key: jax.Array | None
) -> jax.Array:
    # As a matrix: XLA's GPU compiler fuses scales and rounding with a product of matrices alone,
    # and sums would otherwise be written in 32 bits and read again.
    rows = x.reshape(-1, x.shape[-1])
    stopped = lax.stop_gradient((rows, weight))
    x_codes, x_scale = activation_codes(stopped[0], name, ste)
    w_codes, w_scale = weight_codes(stopped[1], ste, key)
    dtype = x.dtype if ste.product == "float" else jnp.int8
    codes = (x_codes.astype(dtype), x_scale, w_codes.astype(dtype), w_scale)
    how: _How = (ste.product, ste.weight_gradient == "clipped")
    y = cast(jax.Array, _product(how, rows, weight, codes))
    return y.reshape(*x.shape[:-1], y.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how: _How, x: jax.Array, weight: jax.Array, codes: _Codes) -> jax.Array:
    """The scaled product [m, n] of codes; ``x`` [m, k] and ``weight`` are there for gradients."""
    del weight
    x_codes, x_scale, w_codes, w_scale = codes
    sums = _dot(x_codes, w_codes, 1, jnp.float32 if how[0] == "float" else jnp.int32)
    return scale_sums(sums, x_scale, w_scale.T).astype(x.dtype)


_Residuals = tuple[jax.Array, _Codes, jax.Array | None]


def _product_fwd(
    how: _How, x: jax.Array, weight: jax.Array, codes: _Codes
) -> tuple[jax.Array, _Residuals]:
    # An empty array says the dtype of x without keeping x.
    return _product(how, x, weight, codes), (x[..., :0], codes, weight if how[1] else None)


def _product_bwd(
    how: _How, residuals: _Residuals, g: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    like, (x_codes, x_scale, w_codes, w_scale), weight = residuals
    if w_scale.ndim:
        scaled = (g.astype(jnp.float32) * w_scale.T).astype(g.dtype)
        dx = _dot(scaled, w_codes.astype(g.dtype), 0, jnp.float32)
    else:
        # One scale may follow the sums: it costs no scaled copy of g, and no rounding.
        dx = _dot(g, w_codes.astype(g.dtype), 0, jnp.float32) * w_scale
    dx = dx.astype(like.dtype)
    values = (x_codes.astype(jnp.float32) / x_scale).astype(like.dtype)
    dw = general_dot(g, values, (((0,), (0,)), ((), ())), jnp.float32)
    if weight is not None:
        dw = jnp.where(jnp.abs(weight) <= w_scale, dw, 0.0)
    return dx, dw, None


_product.defvjp(_product_fwd, _product_bwd)


def _mixed(
    x: jax.Array,
    weight: jax.Array,
    name: str,
    act_quant: ActQuant,
    ste: SteOptions,
    key: jax.Array | None,
    strength: jax.Array,
) -> jax.Array:
    """The product of values, each between what it is and what its codes stand for."""
    values = _towards(x, _activation_values(lax.stop_gradient(x), name, act_quant, ste), strength)
    codes, scale = weight_codes(lax.stop_gradient(weight), ste, key)
    clip = ste.weight_gradient == "clipped"
    inside = (jnp.abs(lax.stop_gradient(weight)) <= scale).astype(weight.dtype) if clip else None
    return _plain(values, _towards(weight, codes * scale, strength, inside))


def _activation_values(x: jax.Array, name: str, act_quant: ActQuant, ste: SteOptions) -> jax.Array:
    if act_quant == "per_token":
        codes, scale = activation_codes(x, name, ste)
        return (codes / scale).astype(x.dtype)
    return fake_quantize_activation(x, act_quant)


@jax.custom_vjp
def _straight(value: jax.Array, through: jax.Array) -> jax.Array:
    """``value``, whose gradient goes to ``through`` as it is."""
    del through
    return value


_straight.defvjp(lambda v, t: (v, None), lambda _, g: (None, g))


def _towards(
    x: jax.Array, quantised: jax.Array, strength: jax.Array, inside: jax.Array | None = None
) -> jax.Array:
    """``x + strength · (quantised - x)``; the gradient passes, where ``inside`` is 1 if given."""
    exact = lax.stop_gradient(x).astype(jnp.float32)
    wide = quantised.astype(jnp.float32)
    value = jnp.where(strength >= 1, wide, exact + strength * (wide - exact)).astype(x.dtype)
    return _straight(value, x if inside is None else x * inside)


def _plain(x: jax.Array, weight: jax.Array) -> jax.Array:
    """``x · W^T`` with the weight in the dtype of ``x``, summed in float32."""
    rows = x.reshape(-1, x.shape[-1])
    y = _dot(rows, weight.astype(x.dtype), 1, jnp.float32).astype(x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _dot(x: jax.Array, weight: jax.Array, axis: int, dtype: jnp.dtype | type) -> jax.Array:
    """The last axis of ``x`` against one of the matrix."""
    return general_dot(x, weight, (((x.ndim - 1,), (axis,)), ((), ())), dtype)


def general_dot(
    left: jax.Array,
    right: jax.Array,
    numbers: lax.DotDimensionNumbers,
    dtype: jnp.dtype | type,
) -> jax.Array:
    """A product summed in ``dtype``; float32 operands are not rounded to TF32 or bfloat16."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return lax.dot_general(left, right, numbers, precision=precision, preferred_element_type=dtype)
