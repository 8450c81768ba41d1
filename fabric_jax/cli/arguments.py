"""Dataclasses as command-line flags."""

from collections.abc import Sequence
from typing import TypeVar

Config = TypeVar("Config")


def parse(config: type[Config], command: str, arguments: Sequence[str]) -> Config:
    """An instance of the dataclass ``config`` from flags.

    Every field is a flag, fields of nested dataclasses too and without a prefix; help texts are the
    fields' own documentation.

    Raises:
        SystemExit: help was asked for (code 0), or a flag is unknown, missing or malformed (2).
        FabricError: a value that the dataclass refuses.
    """
    import tyro

    return tyro.cli(
        config,
        prog=f"fabric-jax {command}",
        args=list(arguments),
        config=(tyro.conf.OmitArgPrefixes,),
    )
