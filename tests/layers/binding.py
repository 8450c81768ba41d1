"""Puts arrays into a module that only declares its parameters."""

from typing import Any, TypeVar

from flax import nnx

Module = TypeVar("Module", bound=nnx.Module)


def bind(module: Module, tree: dict[str, Any]) -> Module:
    """The module over ``tree``, nested dictionaries of arrays as its attributes are nested."""
    graphdef, _ = nnx.split(module)
    return nnx.merge(graphdef, tree)
