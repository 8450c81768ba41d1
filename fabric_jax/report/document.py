"""What a report consists of, before it is Markdown or HTML."""

from dataclasses import dataclass, field
from typing import Literal

Tone = Literal["", "good", "mixed", "bad", "none"]


@dataclass(frozen=True)
class Value:
    """A cell of a table.

    Attributes:
        text: what is printed.
        digest: of the record that it comes from; "" where it has none.
        tone: how it is coloured where there is colour.
    """

    text: str
    digest: str = ""
    tone: Tone = ""


@dataclass(frozen=True, kw_only=True)
class Heading:
    """A section begins."""

    text: str
    level: int = 2


@dataclass(frozen=True, kw_only=True)
class Text:
    """A paragraph; ``small`` for notes under tables."""

    text: str
    small: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of values; the first ``left`` columns are names, the others numbers."""

    columns: tuple[str, ...]
    rows: list[tuple[Value, ...]]
    left: int = 1


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An SVG figure; ``name`` is that of its file."""

    name: str
    svg: str
    caption: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of a claim.

    Attributes:
        claim: in the words of who made it, shortened.
        verdict: holds, holds under these conditions, does not hold, not measured.
        tone: of the verdict.
        reasons: sentences.
        evidence: (what, figure) of the records that say so.
    """

    claim: str
    verdict: str
    tone: Tone
    reasons: list[str]
    evidence: list[tuple[str, Value]] = field(default_factory=list[tuple[str, Value]])


Block = Heading | Text | Table | Picture | Verdict
