"""A step's state, weights and batches on the devices of a mesh."""

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fabric_jax.data.batch import Batch
from fabric_jax.models.decoder import DecoderDefinition
from fabric_jax.models.initialize import Tree
from fabric_jax.parallel.mesh import DATA, FSDP
from fabric_jax.parallel.placement import (
    MICRO_BATCHES,
    WHOLE,
    abstract,
    base_specs,
    place,
    shape_of,
    shardings,
    spread_specs,
)

Trains = Literal["adapter", "base"]
"""Which tree is optimised: LoRA fine-tuning or training from scratch. The other one is frozen."""

GradientSum = Callable[
    [tuple[Tree, Tree], Tree, Batch, jax.Array, jax.Array | None], tuple[jax.Array, Tree]
]
"""``((trained, kept), frozen, batch, key, strength) -> (sum of losses, sum of gradients)``."""


def over_devices(
    function: GradientSum, definition: DecoderDefinition, mesh: Mesh, trains: Trains
) -> GradientSum:
    """``function`` on every device's rows and parts of the base, its results summed over rows.

    Args:
        function: of a decoder that is cut along the mesh.
        definition: of any decoder of these trees.
        mesh: of several devices.
        trains: which tree gradients are of.
    """
    shape = shape_of(mesh)

    def call(
        parts: tuple[Tree, Tree],
        frozen: Tree,
        batch: Batch,
        key: jax.Array,
        strength: jax.Array | None,
    ) -> tuple[jax.Array, Tree]:
        ternary = definition.options.mode != "float"
        specs = base_specs(parts[0] if trains == "base" else frozen, shape, ternary=ternary)
        of_trained, of_frozen = (WHOLE, specs) if trains == "adapter" else (specs, WHOLE)

        def summed(
            parts: tuple[Tree, Tree],
            frozen: Tree,
            batch: Batch,
            key: jax.Array,
            strength: jax.Array | None,
        ) -> tuple[jax.Array, Tree]:
            loss, grads = function(parts, frozen, batch, key, strength)
            loss = lax.psum(loss, (DATA, FSDP))
            if trains == "adapter":
                return loss, lax.psum(grads, (DATA, FSDP))
            return loss, jax.tree.map(_sum_of_part, grads, specs)

        # Gradient rules of kernels don't say over which axes a result varies.
        mapped = jax.shard_map(
            summed,
            mesh=mesh,
            in_specs=((of_trained, WHOLE), of_frozen, MICRO_BATCHES, WHOLE, WHOLE),
            out_specs=(WHOLE, of_trained),
            check_vma=False,
        )
        return mapped(parts, frozen, batch, key, strength)

    return call


def _sum_of_part(gradient: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The sum over devices with other rows; what is cut along ``fsdp`` has that one's already."""
    return lax.psum(gradient, DATA if FSDP in spec else (DATA, FSDP))


def state_specs(
    state: Any, definition: DecoderDefinition, mesh: Mesh, trains: Trains, *, spread: bool
) -> Any:
    """A spec for each leaf of a ``TrainState``.

    Args:
        state: arrays or shapes.
        definition: of the decoder.
        mesh: where the state lies.
        trains: what it is of. A base and its moments are cut as the base is.
        spread: whether an adapter and its moments are cut along all devices that have other rows,
            instead of being whole on each.
    """
    shape = shape_of(mesh)
    if trains == "base":
        return base_specs(state, shape, ternary=definition.options.mode != "float")
    return spread_specs(state, shape) if spread else jax.tree.map(lambda _: WHOLE, state)


def constrain_state(
    state: Any, definition: DecoderDefinition, mesh: Mesh, trains: Trains, *, spread: bool
) -> Any:
    """The state, which the compiler is told to leave where :func:`place_state` puts it."""
    specs = state_specs(state, definition, mesh, trains, spread=spread)
    return lax.with_sharding_constraint(state, shardings(mesh, specs))


def place_state(
    state: Any, definition: DecoderDefinition, mesh: Mesh, trains: Trains, *, spread: bool
) -> Any:
    """A ``TrainState`` that every process has whole, on the devices of a mesh."""
    specs = state_specs(state, definition, mesh, trains, spread=spread)
    return place(state, shardings(mesh, specs))


def abstract_state(
    state: Any, definition: DecoderDefinition, mesh: Mesh, trains: Trains, *, spread: bool
) -> Any:
    """The shapes of a state with their shardings, for compiling before there are arrays."""
    specs = state_specs(state, definition, mesh, trains, spread=spread)
    return abstract(state, shardings(mesh, specs))


def abstract_rows(batch: Batch, mesh: Mesh) -> Batch:
    """The same of the micro-batches of a step, whose shapes are those of all rows."""
    sharding = NamedSharding(mesh, MICRO_BATCHES)
    return abstract(batch, jax.tree.map(lambda _: sharding, batch))
