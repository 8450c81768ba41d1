"""The command line that repeats a configuration."""

import dataclasses
import shlex
from typing import Any, cast


def command_line(command: str, config: Any) -> str:
    """``fabric-jax command`` with a flag for each value that differs from its default.

    Args:
        command: the subcommand.
        config: its dataclass; fields of nested ones are flags without a prefix.
    """
    return shlex.join(["fabric-jax", command, *flags(config)])


def flags(config: Any) -> list[str]:
    """The flags that make ``config``, as words."""
    words: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            words += flags(value)
        elif value != _default(field):
            words += _words(field.name.replace("_", "-"), value)
    return words


def _words(flag: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, tuple):
        return [f"--{flag}", *map(_word, cast(tuple[Any, ...], value))]
    return [f"--{flag}", str(value)]


def _word(item: Any) -> str:
    """An item of a flag that takes several; pairs are written name=number."""
    return "=".join(map(str, cast(tuple[Any, ...], item))) if isinstance(item, tuple) else str(item)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
