"""From master weights to packed ones: what a model trained from scratch becomes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from fabric_kernels import Packing, pack
from fabric_kernels.packing import unpack
from jax import lax
from jaxtyping import Array, Float32, UInt8

from fabric_jax.errors import FabricError
from fabric_jax.models.decoder import DecoderDefinition, define_decoder
from fabric_jax.models.initialize import Tree
from fabric_jax.quantization.absmean import absmean_quantize
from fabric_jax.quantization.master_linear import weight_codes
from fabric_jax.quantization.ste_options import SteOptions, check_packable


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
        FabricError: the decoder has another mode, or was trained with quantisers that packed
            weights can't express.
    """
    if definition.options.mode != "master":
        raise FabricError(
            f"{definition.config.name} can't be packed",
            expected="master weights",
            found=f"the mode {definition.options.mode!r}",
        )
    check_packable(definition.options.ste, definition.config.name)
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


def check_codes(master: jax.Array, packed: jax.Array, scale: jax.Array) -> None:
    """Asserts that a packed matrix is what the training forward makes of its master.

    Compared are the codes that ``master_linear`` multiplies and their scale, with those that were
    packed, all of them. One in a million may differ: where a weight lies at a rounding boundary,
    another order of summing the absmean moves it. Both are computed by the device that packs: a GPU
    that trained sums in yet another order, and rounds the reciprocal otherwise.

    Args:
        master: float32 [N, K].
        packed: uint8 [N, W], ``ternary2``.
        scale: float32 [].

    Raises:
        FabricError: more codes differ, or the scale does.
    """
    differing, other = jax.device_get(_differences(master, packed))
    if differing > 1e-6 * master.size or abs(other - float(scale)) > 1e-6 * other:
        raise FabricError(
            "packing gives other weights than the training forward",
            expected=f"the scale {other} and no other codes",
            found=f"the scale {float(scale)} and {int(differing)} of {master.size} other codes",
        )


@jax.jit
def _differences(master: jax.Array, packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    codes, scale = weight_codes(master, SteOptions())
    found = unpack(packed, master.shape[1], "ternary2").astype(codes.dtype)
    return jnp.sum(found != codes), scale
