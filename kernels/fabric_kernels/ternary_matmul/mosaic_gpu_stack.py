"""Weights as the Hopper kernels read them: a stack of whole tiles, and which of its layers."""

from dataclasses import replace

import jax.numpy as jnp
from jax.experimental import pallas as pl

from fabric_kernels.ternary_matmul.weight import TernaryWeight


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple that is not below ``size``."""
    return pl.cdiv(size, multiple) * multiple


def whole_tiles(size: int, tile: int) -> int:
    """Of an axis that copies may begin past: its size up to whole tiles, two or more.

    An axis that has one tile is left out of the copies of one (jax 0.10 to 0.11): what begins past
    it would be read from its start, or stored there.
    """
    return max(2 * tile, round_up(size, tile))


def padded_stack(weight: TernaryWeight, rows: int, width: int) -> TernaryWeight:
    """The weight with packed uint8 [L, rows, width] and a layer int32 [1].

    The stack itself where it has that size; otherwise a padded copy of the layer, alone.

    Args:
        weight: [L, N, W] with a layer, or [N, W].
        rows: at least N.
        width: at least W.
    """
    n, w = weight.packed.shape[-2:]
    if (n, w) != (rows, width):
        weight = weight.single()
        packed = jnp.pad(weight.packed, ((0, rows - n), (0, width - w)))
        weight = replace(weight, packed=packed)
    if weight.layer is None:
        return replace(weight, packed=weight.packed[None], layer=jnp.zeros((1,), jnp.int32))
    return replace(weight, layer=weight.layer.astype(jnp.int32).reshape(1))
