"""A report as Markdown; figures lie beside it, numbers link to their records."""

from collections.abc import Callable, Sequence
from urllib.parse import quote

from fabric_jax.report.document import Block, Heading, Picture, Table, Text, Value, Verdict
from fabric_jax.report.records_index import Index


def to_markdown(blocks: Sequence[Block], index: Index, *, base: str) -> str:
    """The text of ``report.md``.

    Args:
        blocks: the report.
        index: of its records.
        base: what leads from the report to the folder of records.
    """
    # Spaces and parentheses would end a link.
    places = {record.digest: base + quote(where, safe="/#") for where, record in index.places}

    def linked(value: Value) -> str:
        text = value.text.replace("|", "\\|").replace("*", "\\*")
        place = places.get(value.digest)
        return f"[{text}]({place})" if place and text else text

    parts: list[str] = []
    for block in blocks:
        match block:
            case Heading():
                parts.append(f"{'#' * block.level} {block.text}")
            case Text():
                parts.append(block.text.replace("*", "\\*"))
            case Picture():
                parts.append(f"![{block.caption}](figures/{block.name}.svg)\n\n*{block.caption}*")
            case Table():
                parts.append(_table(block, linked))
            case Verdict():
                evidence = "".join(f"\n  - {what}: {linked(v)}" for what, v in block.evidence)
                reasons = " ".join(block.reasons).replace("*", "\\*")
                parts.append(f"- **{block.claim}: {block.verdict}.** {reasons}{evidence}")
    return "\n\n".join(parts) + "\n"


def _table(table: Table, show: Callable[[Value], str]) -> str:
    rules = ["---" if i < table.left else "--:" for i in range(len(table.columns))]
    lines = [f"| {' | '.join(table.columns)} |", f"|{'|'.join(rules)}|"]
    lines += [f"| {' | '.join(map(show, row))} |" for row in table.rows]
    return "\n".join(lines)
