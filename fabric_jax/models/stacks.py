"""The parameters of stacked layers: what a scan over them slices, and what it leaves whole."""

from typing import Any, cast


def split_packed(tree: dict[str, Any], frozen: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The stacks of frozen linears, which stay whole in the scan, and all other parameters."""
    packed: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, child in tree.items():
        if not isinstance(child, dict):
            rest[name] = child
        elif frozen and ("weight" in child or "codes" in child):
            packed[name] = child
        else:
            packed[name], rest[name] = split_packed(cast(dict[str, Any], child), frozen)
    return packed, rest


def join_trees(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The union of two trees that share no leaf."""
    joined = dict(first)
    for name, child in second.items():
        joined[name] = join_trees(joined[name], child) if name in joined else child
    return joined
