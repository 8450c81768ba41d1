"""The programs of generation on the devices of a mesh.

As in training, each device has its rows and its parts of the base; rows are those of prompts and
tokens, and of the cache. Along ``tensor`` all have the same rows and whole activations, so that
each attends with every head and holds every head's keys and values.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from fabric_jax.generation.state import DecodeState, Weights
from fabric_jax.models.decoder import DecoderDefinition
from fabric_jax.parallel.axes import RULES
from fabric_jax.parallel.mesh import TENSOR, MeshShape
from fabric_jax.parallel.placement import ROWS, WHOLE, base_specs, shape_of

CACHE_ROWS = PartitionSpec(None, RULES["rows"])
"""Of a cache's arrays [L, B, ...]."""


def of_rows(tree: Any) -> Any:
    """The spec of arrays [B, ...], leaf by leaf; None stays None."""
    return jax.tree.map(lambda _: ROWS, tree)


def weights_specs(weights: Weights, definition: DecoderDefinition, mesh: Mesh) -> Weights:
    """Specs of what a program computes with: the base cut as in training, adapters whole."""
    ternary = definition.options.mode != "float"
    return Weights(
        base=base_specs(weights.base, shape_of(mesh), ternary=ternary),
        adapter=jax.tree.map(lambda _: WHOLE, weights.adapter),
        adapter_ids=of_rows(weights.adapter_ids),
    )


def state_specs(state: DecodeState) -> DecodeState:
    """Specs of a state: everything by rows but the number of steps."""
    cache = jax.tree.map(lambda _: CACHE_ROWS, state.cache)
    return replace(of_rows(state), cache=cache, step=WHOLE)


def over_devices(
    function: Callable[..., DecodeState], mesh: Mesh, specs: tuple[Any, ...], out: Any
) -> Callable[..., DecodeState]:
    """``function`` of each device's rows and parts."""
    # Rules of kernels don't say over which axes a result varies.
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)


def any_row(mesh: MeshShape, flag: jax.Array) -> jax.Array:
    """Whether ``flag`` [] is true for the rows of any device; called within ``shard_map``.

    Devices that share a matrix have to take the same number of steps.
    """
    if mesh.row_shards == 1:
        return flag
    return lax.pmax(flag.astype("int32"), RULES["rows"]) > 0


def agreed_tokens(mesh: MeshShape, tokens: jax.Array) -> jax.Array:
    """``tokens`` [B], the same on all devices that have these rows.

    They compute the same from the same; should one round otherwise, their rows would part.
    """
    return tokens if mesh.tensor == 1 else lax.pmax(tokens, TENSOR)
