"""Which channels go with the bytes of a packed matrix that is cut along K; within a manual mesh."""

import jax
import jax.numpy as jnp
from jax import lax

from fabric_kernels.packing import CODES_PER_BYTE, DIGITS_PER_BYTE, Packing

Axes = str | tuple[str, ...]
"""Of a mesh; several count as one, the first as the slowest."""


def codes_per_byte(packing: Packing) -> int:
    """Of a layout."""
    return CODES_PER_BYTE if packing == "ternary2" else DIGITS_PER_BYTE


def own_inputs(x: jax.Array, width: int, packing: Packing, axes: Axes, parts: int) -> jax.Array:
    """The channels of ``x`` [..., K] whose codes this device's bytes hold; zeros beyond K.

    Args:
        x: whole.
        width: bytes of a row that this device has.
        packing: of the bytes.
        axes: of the mesh, along which the rows are cut.
        parts: devices along them.

    Returns:
        [..., width times codes a byte].
    """
    per_byte = codes_per_byte(packing)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width * parts * per_byte - x.shape[-1])])
    start = lax.axis_index(axes) * width
    if packing == "ternary2":
        return lax.dynamic_slice_in_dim(x, start * per_byte, width * per_byte, x.ndim - 1)
    by_digit = x.reshape(*x.shape[:-1], per_byte, -1)
    own = lax.dynamic_slice_in_dim(by_digit, start, width, x.ndim)
    return own.reshape(*x.shape[:-1], -1)


def whole_inputs(x: jax.Array, k: int, packing: Packing, axes: Axes) -> jax.Array:
    """All ``k`` channels from every device's own, the inverse of :func:`own_inputs`."""
    if packing == "ternary2":
        return lax.all_gather(x, axes, axis=x.ndim - 1, tiled=True)[..., :k]
    by_digit = x.reshape(*x.shape[:-1], DIGITS_PER_BYTE, -1)
    whole = lax.all_gather(by_digit, axes, axis=x.ndim, tiled=True)
    return whole.reshape(*x.shape[:-1], -1)[..., :k]
