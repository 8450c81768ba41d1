"""From master weights to packed ones: what a model trained from scratch becomes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import cast

import jax
from fabric_kernels import Packing, pack
from jax import lax
from jaxtyping import Array, Float32, UInt8

from fabric_jax.errors import FabricError
from fabric_jax.models.decoder import DecoderDefinition, define_decoder
from fabric_jax.models.initialize import Tree
from fabric_jax.quantization.absmean import absmean_quantize


def pack_base(definition: DecoderDefinition, base: Tree) -> tuple[DecoderDefinition, Tree]:
    """Quantises every master weight once and for all, by the rule of the forward pass.

    Adapters fit the result as they fitted the original. Embedding, norms and head are the same
    arrays as in ``base``, not copies.

    Args:
        definition: a decoder in the mode ``master``.
        base: its weights.

    Returns:
        The same decoder in the mode ``packed``, and its weights in the layout ``options.packing``.

    Raises:
        FabricError: the decoder has another mode.
    """
    if definition.options.mode != "master":
        raise FabricError(
            f"{definition.config.name} can't be packed",
            expected="master weights",
            found=f"the mode {definition.options.mode!r}",
        )
    packed = define_decoder(definition.config, replace(definition.options, mode="packed"))
    change = partial(_pack_linear, packing=packed.options.packing)
    tree = base
    for path in definition.config.linear_shapes:
        tree = _replace(tree, ("layers", *path.split(".")), change)
    return packed, tree


def _pack_linear(linear: Tree, packing: Packing) -> Tree:
    weight, scale = pack_stack(linear["weight"], packing)
    return {"weight": weight, "scale": scale}


def _replace(tree: Tree, path: tuple[str, ...], change: Callable[[Tree], Tree]) -> Tree:
    """A copy of nested dictionaries with ``change`` applied to the one at ``path``."""
    if not path:
        return change(tree)
    return tree | {path[0]: _replace(cast(Tree, tree[path[0]]), path[1:], change)}


@partial(jax.jit, static_argnames="packing")
def pack_stack(
    weights: Float32[Array, "l n k"], packing: Packing = "ternary2"
) -> tuple[UInt8[Array, "l n w"], Float32[Array, " l"]]:
    """Packed absmean codes and scales of a stack of matrices, quantised one at a time."""

    def one(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        codes, scale = absmean_quantize(weight)
        return pack(codes, packing), scale

    return lax.map(one, weights)
