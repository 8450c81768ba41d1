"""Inline PTX as text, read."""

import re
from dataclasses import dataclass
from functools import cache

import numpy as np

Names = dict[str, np.ndarray]
"""Registers of a warp, [32] each."""


@dataclass(frozen=True)
class Line:
    """An instruction.

    Attributes:
        name: with everything after its points.
        operands: words, ``[...]`` and ``{...}`` as one.
        predicate: a register, or None.
        negated: whether it is executed where that is false.
    """

    name: str
    operands: tuple[str, ...]
    predicate: str | None = None
    negated: bool = False


def parts(word: str) -> list[str]:
    """The words of ``{...}``."""
    return [one.strip() for one in word.strip("{}").split(",")]


@cache
def parsed(text: str) -> tuple[list[Line], dict[str, int]]:
    """Instructions and labels of inline PTX."""
    lines: list[Line] = []
    labels: dict[str, int] = {}
    # Scopes hold whole instructions; vectors are in braces too, but within one.
    for statement in re.sub(r"^\s*\{ |\}\s*$", "", text.strip()).split(";"):
        statement = statement.strip().removeprefix("{ ").strip()
        if (label := re.match(r"(\w+):\s*", statement)) is not None:
            labels[label[1]] = len(lines)
            statement = statement[label.end() :]
        if not statement or statement.startswith(".reg") or statement == "}":
            continue
        predicate, negated = None, False
        if statement.startswith("@"):
            word, statement = statement.split(None, 1)
            predicate, negated = word.lstrip("@!"), "!" in word
        name, _, rest = statement.partition(" ")
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
        lines.append(Line(name, tuple(operands), predicate, negated))
    return lines, labels
