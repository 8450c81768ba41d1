"""Multiplications that can be undone bit for bit."""

import numpy as np
from jaxtyping import Float32, Int8

from fabric_jax.errors import FabricError


def multiply(
    x: Float32[np.ndarray, "..."], factor: float
) -> tuple[Float32[np.ndarray, "..."], Int8[np.ndarray, "..."]]:
    """``x * factor`` in float32, and by how many steps of float32 dividing it again misses ``x``.

    Two neighbours can have the same product, so the quotient alone does not say which it was.
    """
    x = np.ascontiguousarray(x, np.float32)
    product = (x.astype(np.float64) * factor).astype(np.float32)
    missed = x.view(np.int32) - _divide(product, factor).view(np.int32)
    if np.abs(missed).max(initial=0) > 127:
        raise FabricError(f"values that can't be multiplied by {factor:g} in float32")
    return product, missed.astype(np.int8)


def undo(
    product: Float32[np.ndarray, "..."], factor: float, missed: Int8[np.ndarray, "..."] | None
) -> Float32[np.ndarray, "..."]:
    """The ``x`` of :func:`multiply`; to half a step where ``missed`` is None."""
    quotient = _divide(np.ascontiguousarray(product, np.float32), factor)
    if missed is None:
        return quotient
    return (quotient.view(np.int32) + missed.astype(np.int32)).view(np.float32)


def _divide(x: Float32[np.ndarray, "..."], factor: float) -> Float32[np.ndarray, "..."]:
    return (x.astype(np.float64) / factor).astype(np.float32)
