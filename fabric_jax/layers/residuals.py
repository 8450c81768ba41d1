"""Int8 residuals: a backward pass that reads rounded values after a forward pass that is exact.

Activation compression as in ActNN (Chen et al. 2021, arXiv:2104.14129), here with BitNet's own
quantiser. A value exists twice: as it is, without a gradient, and as its int8 codes stand for it,
with one. The forward pass uses the first and, of the second, needs the codes alone; everything
else of the second is dead code there. The backward pass is the gradient of the second, computed
from the codes that a rematerialisation policy keeps under ``INT8_RESIDUAL``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from fabric_kernels import with_gradient_of
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from fabric_jax.quantization.absmax import absmax_quantize

INT8_RESIDUAL = "int8_residual"
"""The name under which rematerialisation policies know the codes and their scales."""


@dataclass(frozen=True)
class Twin:
    """A value as it is and as the backward pass knows it.

    Attributes:
        exact: [...], floats; no gradient flows through it.
        kept: of the same shape and dtype, rounded or computed from rounded values; every gradient
            flows through it.
    """

    exact: jax.Array
    kept: jax.Array


def as_codes(y: jax.Array) -> Twin:
    """``y`` [..., n] and what its int8 codes, absmax over the last axis, stand for.

    The codes [..., n] and their float32 scales [..., 1] bear the name ``INT8_RESIDUAL``. The
    gradient of what they stand for is that of ``y``: the rounding counts as identity.
    """
    exact = lax.stop_gradient(y)
    codes, scale = (checkpoint_name(part, INT8_RESIDUAL) for part in absmax_quantize(exact))
    value = (codes.astype(jnp.float32) / scale).astype(y.dtype)
    return Twin(exact, with_gradient_of(value, y))


def on_both(f: Callable[..., jax.Array], *inputs: Any, **options: Any) -> jax.Array | Twin:
    """``f`` of the inputs, and where one of them is a twin, of both forms of it.

    Inputs that are no twins are the same for both; the gradient flows through the kept form alone.
    """
    if not any(isinstance(x, Twin) for x in inputs):
        return f(*inputs, **options)
    exact = f(*(exact_form(x) for x in inputs), **options)
    kept = f(*(x.kept if isinstance(x, Twin) else x for x in inputs), **options)
    return Twin(lax.stop_gradient(exact), kept)


def exact_form(x: Any) -> Any:
    """What a forward pass computes with: a twin's exact values, and anything else as it is."""
    return x.exact if isinstance(x, Twin) else x


def joined(x: jax.Array | Twin) -> jax.Array:
    """One array again: the exact values, with the gradient of the kept ones."""
    return with_gradient_of(x.exact, x.kept) if isinstance(x, Twin) else x


def from_codes(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """``f`` of arrays, whose gradient is that of ``f`` at the values their codes stand for."""
    return lambda *inputs: joined(on_both(f, *map(as_codes, inputs)))
