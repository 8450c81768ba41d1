"""Several adapters over one base in one batch: stacks of which each row takes its own."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from fabric_jax.errors import FabricError
from fabric_jax.layers.lora import TARGET_GROUPS, LoraConfig
from fabric_jax.models.decoder import DecoderDefinition, define_decoder
from fabric_jax.models.initialize import Tree, nest

Member = tuple[LoraConfig, Tree]
"""An adapter: its settings and its weights [L, R, K], [L, R, N]."""


def stack_adapters(
    definition: DecoderDefinition, members: Sequence[Member]
) -> tuple[DecoderDefinition, Tree]:
    """The decoder with room for all members, and the stack [L, n + 1, R, ...] of them.

    Number 0 adds nothing: the base alone. Member i has number i + 1. Ranks are filled up with zeros
    to the largest of each linear and scales brought to one in B, which changes no output but in the
    last digits.

    Raises:
        FabricError: there are no members.
    """
    if not members:
        raise FabricError("there are no adapters to stack")
    combined = define_decoder(
        definition.config, replace(definition.options, lora=_union([lora for lora, _ in members]))
    )
    leaves: list[tuple[tuple[str, ...], jax.Array]] = []
    for path, variable in nnx.to_flat_state(combined.adapter):
        names = tuple(str(part) for part in path)
        shape = variable.get_value().shape
        linear, kind = names[-3], names[-1]
        common = combined.options.lora.of(linear).scale
        parts = [jnp.zeros(shape, jnp.float32)]
        for lora, tree in members:
            leaf = _leaf(tree, names)
            if leaf is None:
                parts.append(jnp.zeros(shape, jnp.float32))
                continue
            factor = lora.of(linear).scale / common if kind == "b" else 1.0
            missing = shape[1] - leaf.shape[1]
            filled = jnp.pad(leaf.astype(jnp.float32), ((0, 0), (0, missing), (0, 0)))
            parts.append(filled * jnp.float32(factor))
        leaves.append((names, jnp.stack(parts, axis=1)))
    return combined, nest(leaves)


def _union(members: Sequence[LoraConfig]) -> LoraConfig:
    """Settings whose adapters hold any of the members': largest ranks, the first scales not 0."""
    names = [
        name for name in TARGET_GROUPS["all"] if any(member.covers(name) for member in members)
    ]
    ranks = {name: max(m.of(name).rank for m in members if m.covers(name)) for name in names}
    found = {name: [m.of(name).scale for m in members if m.covers(name)] for name in names}
    scales = {name: next(filter(None, own), 1.0) for name, own in found.items()}
    first = names[0]
    return LoraConfig(
        rank=ranks[first],
        alpha=ranks[first] * scales[first],
        targets=tuple(names),
        ranks=tuple(ranks.items()),
        alphas=tuple((name, ranks[name] * scales[name]) for name in names),
    )


def _leaf(tree: Tree, names: Sequence[str]) -> jax.Array | None:
    node: Tree | jax.Array = tree
    for name in names:
        if not isinstance(node, dict) or name not in node:
            return None
        node = node[name]
    assert not isinstance(node, dict)
    return node
