"""Dataclasses as command-line flags."""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

if TYPE_CHECKING:
    from tyro.constructors import PrimitiveConstructorSpec, PrimitiveTypeInfo

Config = TypeVar("Config")


def parse(config: type[Config], command: str, arguments: Sequence[str]) -> Config:
    """An instance of the dataclass ``config`` from flags.

    Every field is a flag, fields of nested dataclasses too and without a prefix; help texts are the
    fields' own documentation. Fields with ``positional`` in their metadata also take the words
    before the first flag. Pairs of a name and a number are written name=number.

    Raises:
        SystemExit: help was asked for (code 0), or a flag is unknown, missing or malformed (2).
        FabricError: a value that the dataclass refuses.
    """
    import tyro
    from tyro.constructors import ConstructorRegistry

    registry = ConstructorRegistry()
    registry.primitive_rule(_named_number)
    return tyro.cli(
        config,
        prog=f"fabric-jax {command}",
        args=_named(config, arguments),
        config=(tyro.conf.OmitArgPrefixes,),
        registry=registry,
    )


def _named(config: type[Any], arguments: Sequence[str]) -> list[str]:
    """The words before the first flag under the names of the fields that take them."""
    fields = [f.name for f in dataclasses.fields(config) if f.metadata.get("positional")]
    leading = list(itertools.takewhile(lambda word: not _is_flag(word), arguments))
    if len(leading) > len(fields):
        return list(arguments)
    pairs = zip(fields, leading, strict=False)
    named = [f"--{name}={value}" for name, value in pairs]
    return [*named, *arguments[len(leading) :]]


def _is_flag(word: str) -> bool:
    """Whether a word is a flag; standard input (-) and texts such as "- one" are none."""
    return re.fullmatch(r"--?[a-zA-Z][\w-]*(=.*)?", word, re.DOTALL) is not None


def _named_number(info: "PrimitiveTypeInfo") -> "PrimitiveConstructorSpec[Any] | None":
    """How ``tuple[str, int]`` and ``tuple[str, float]`` are written: as one word, ``q=16``."""
    from tyro.constructors import PrimitiveConstructorSpec

    kinds = get_args(info.type)
    if get_origin(info.type) is not tuple or kinds not in ((str, int), (str, float)):
        return None

    def parse_word(words: list[str]) -> tuple[str, Any]:
        name, _, number = words[0].partition("=")
        return name, kinds[1](number)

    def is_pair(value: Any) -> bool:
        return isinstance(value, tuple) and tuple(map(type, value)) in (kinds, (str, int))

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"NAME={kinds[1].__name__.upper()}",
        instance_from_str=parse_word,
        is_instance=is_pair,
        str_from_instance=lambda pair: [f"{pair[0]}={pair[1]}"],
    )
