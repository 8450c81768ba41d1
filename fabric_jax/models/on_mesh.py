"""A base on the devices of a mesh."""

from flax import nnx
from jax.sharding import Mesh

from fabric_jax.models.decoder import DecoderDefinition
from fabric_jax.models.initialize import Tree
from fabric_jax.parallel.placement import abstract, base_specs, place, shape_of, shardings


def base_shardings(definition: DecoderDefinition, mesh: Mesh) -> Tree:
    """Where each leaf of a base lies on a mesh."""
    base: Tree = nnx.to_pure_dict(definition.base)
    ternary = definition.options.mode != "float"
    return shardings(mesh, base_specs(base, shape_of(mesh), ternary=ternary))


def place_base(base: Tree, definition: DecoderDefinition, mesh: Mesh) -> Tree:
    """A base that every process has whole, cut along a mesh."""
    return place(base, base_shardings(definition, mesh))


def abstract_base(definition: DecoderDefinition, mesh: Mesh) -> Tree:
    """The same of a base."""
    return abstract(nnx.to_pure_dict(definition.base), base_shardings(definition, mesh))
