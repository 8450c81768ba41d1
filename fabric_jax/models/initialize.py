"""Random weights, made leaf by leaf in their final format."""

import zlib
from functools import partial, reduce
from operator import getitem
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from fabric_jax.layers.parameters import Initializer
from fabric_jax.models.decoder import DecoderDefinition

Tree = dict[str, Any]
"""Nested dictionaries of arrays."""

BLOCK_ELEMENTS = 1 << 22


def initialize_base(
    definition: DecoderDefinition, seed: int, *, shardings: Tree | None = None
) -> Tree:
    """Random base weights of a decoder, on the default device.

    With ``shardings``, a tree of them, each leaf is put there before the next one is made.
    """
    return _initialize(definition.base, jax.random.key(seed), shardings)


def initialize_adapter(definition: DecoderDefinition, seed: int) -> Tree:
    """A fresh LoRA adapter: its output is zero."""
    return _initialize(definition.adapter, jax.random.fold_in(jax.random.key(seed), 1))


def _initialize(state: nnx.State[Any, Any], root: jax.Array, shardings: Tree | None = None) -> Tree:
    """Fills a declared tree; the key of a tensor is the root folded with its path and layer."""
    filled: list[tuple[tuple[str, ...], jax.Array]] = []
    for path, variable in nnx.to_flat_state(state):
        names = tuple(str(part) for part in path)
        # Codes of a quantised matrix stand for the very numbers that the float one would have.
        path_of_floats = "/".join(names)
        if names[-1] == "codes":
            path_of_floats = "/".join((*names[:-1], *(["weight"] if names[0] == "layers" else [])))
        key = jax.random.fold_in(root, zlib.crc32(path_of_floats.encode()))
        like = cast(jax.ShapeDtypeStruct, variable.get_value())
        make = cast(Initializer, variable.get_metadata("initializer"))
        leaf = _make(make, bool(variable.get_metadata("stacked")), like, key)
        if shardings is not None:
            leaf = jax.block_until_ready(jax.device_put(leaf, reduce(getitem, names, shardings)))
        filled.append((names, leaf))
    return nest(filled)


def nest(leaves: list[tuple[tuple[str, ...], Any]]) -> Tree:
    """Nested dictionaries from (path, leaf) pairs."""
    tree: Tree = {}
    for path, leaf in leaves:
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


@partial(jax.jit, static_argnums=(0, 1, 2))
def _make(
    make: Initializer, stacked: bool, like: jax.ShapeDtypeStruct, key: jax.Array
) -> jax.Array:
    """One tensor, made a layer or a block of rows at a time: scratch stays that of one part."""
    if not stacked:
        return _by_blocks(make, like, key)

    def one(layer_key: jax.Array) -> jax.Array:
        return make(layer_key, like.shape[1:], like.dtype)

    return lax.map(one, jax.random.split(key, like.shape[0]))


def _by_blocks(make: Initializer, like: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
    """A tensor of one layer, by blocks of rows; the last block ends with the last row."""
    rows = like.shape[0]
    block = min(rows, max(1, BLOCK_ELEMENTS // max(1, like.size // rows)))
    if block == rows:
        return make(key, like.shape, like.dtype)

    def write(index: jax.Array, out: jax.Array) -> jax.Array:
        part = make(jax.random.fold_in(key, index), (block, *like.shape[1:]), like.dtype)
        start = jnp.minimum(index * block, rows - block)
        return lax.dynamic_update_slice_in_dim(out, part, start, 0)

    return lax.fori_loop(0, -(-rows // block), write, jnp.zeros(like.shape, like.dtype))
