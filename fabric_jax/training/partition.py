"""Which leaves of a trained tree are trained: all of them, or those of an adapter but its A.

With A frozen (LoRA-FA, Zhang et al. 2023, arXiv:2308.03303) gradients and optimizer state exist
for B alone. Leaves that are left out are None, which JAX takes for a subtree without leaves.
"""

from typing import Any

import jax

from fabric_jax.models.decoder import DecoderDefinition
from fabric_jax.models.initialize import Tree


def freezes_a(definition: DecoderDefinition, trains: str) -> bool:
    """Whether a run that trains ``trains`` (``adapter`` or ``base``) leaves A as it is."""
    return trains == "adapter" and definition.options.lora.freeze_a


def trained_leaves(tree: Any, *, freeze_a: bool) -> Any:
    """The tree with None for every A where ``freeze_a``; taking it twice changes nothing."""
    return _where(tree, keep_a=False) if freeze_a else tree


def split(params: Tree, *, freeze_a: bool) -> tuple[Tree, Tree]:
    """The trained leaves and the frozen ones, each tree with None for the leaves of the other."""
    frozen = _where(params, keep_a=True) if freeze_a else jax.tree.map(lambda _: None, params)
    return trained_leaves(params, freeze_a=freeze_a), frozen


def join(trained: Tree, frozen: Tree) -> Tree:
    """The inverse of :func:`split`."""
    return jax.tree.map(
        lambda one, other: other if one is None else one,
        trained,
        frozen,
        is_leaf=lambda leaf: leaf is None,
    )


def _where(tree: Any, *, keep_a: bool) -> Any:
    """The tree with None for all leaves but A, or for A alone."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if _is_a(path) == keep_a else None, tree
    )


def _is_a(path: tuple[Any, ...]) -> bool:
    """Whether a leaf is the A of an adapter: ``.../lora/a``."""
    return [getattr(part, "key", None) for part in path[-2:]] == ["lora", "a"]
