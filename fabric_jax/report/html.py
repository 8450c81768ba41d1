"""A report as one HTML page that needs nothing else: styles, figures and records are in it."""

from collections.abc import Sequence
from pathlib import Path

from fabric_jax.report.document import Block, Heading, Picture, Table, Text, Value, Verdict
from fabric_jax.report.plot import Shared, shared
from fabric_jax.report.records_html import escaped as _text
from fabric_jax.report.records_html import records_html
from fabric_jax.report.records_index import Index

# A link into closed details opens them; without scripts the record is still where the link leads.
SCRIPT = """
function show() { const found = document.getElementById(location.hash.slice(1));
  if (found && found.tagName == 'DETAILS') found.open = true }
addEventListener('hashchange', show); show()
"""


def to_html(blocks: Sequence[Block], index: Index) -> str:
    """The text of ``report.html``."""
    sections = [block.text for block in blocks if isinstance(block, Heading) and block.level == 2]
    contents = "".join(f'<a href="#{_slug(name)}">{_text(name)}</a>' for name in sections)
    figures = shared([block.svg for block in blocks if isinstance(block, Picture)])
    body: list[str] = [figures.html()]
    for block in blocks:
        body.append(_block(block, figures))
        if isinstance(block, Heading) and block.level == 1:
            body.append(f'<nav>{contents}<a href="#records">Records</a></nav>')
    first = next((b.text for b in blocks if isinstance(b, Heading)), "Report")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(first)}</title>\n<style>{_style()}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + f'\n<h2 id="records">Records</h2>\n{records_html(index)}\n'
        f"<script>{SCRIPT}</script>\n"
        "</body>\n</html>\n"
    )


def _block(block: Block, figures: Shared) -> str:
    match block:
        case Heading():
            name = f' id="{_slug(block.text)}"' if block.level == 2 else ""
            return f"<h{block.level}{name}>{_text(block.text)}</h{block.level}>"
        case Text():
            kind = ' class="small"' if block.small else ""
            return f"<p{kind}>{_text(block.text)}</p>"
        case Picture():
            svg = figures.embedded(block.svg, block.name)
            return f"<figure>{svg}<figcaption>{_text(block.caption)}</figcaption></figure>"
        case Table():
            return _table(block)
        case Verdict():
            return _verdict(block)


def _table(table: Table) -> str:
    left = [' class="l"' if i < table.left else "" for i in range(len(table.columns))]
    head = "".join(f"<th{c}>{_text(n)}</th>" for n, c in zip(table.columns, left, strict=True))
    rows: list[str] = []
    for row in table.rows:
        cells: list[str] = []
        for i, value in enumerate(row):
            names = [*(["l"] if i < table.left else []), *([value.tone] if value.tone else [])]
            kind = ' class="' + " ".join(names) + '"' if names else ""
            cells.append(f"<td{kind}>{_value(value)}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>'
        + "\n".join(rows)
        + "</tbody></table></div>"
    )


def _verdict(block: Verdict) -> str:
    reasons = "".join(f"<p>{_text(reason)}</p>" for reason in block.reasons)
    evidence = ""
    if block.evidence:
        items = "".join(f"<li>{_text(what)}: {_value(v)}</li>" for what, v in block.evidence)
        summary = f"<summary>the {len(block.evidence)} figures behind it</summary>"
        evidence = f"<details>{summary}<ul>{items}</ul></details>"
    return (
        f'<div class="claim {block.tone}"><strong>{_text(block.claim)}</strong>'
        f'<span class="badge">{_text(block.verdict)}</span>{reasons}{evidence}</div>'
    )


def _value(value: Value) -> str:
    text = _text(value.text)
    return f'<a href="#r-{value.digest}">{text}</a>' if value.digest and text else text


def _style() -> str:
    return (Path(__file__).parent / "style.css").read_text(encoding="utf-8")


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.lower())
