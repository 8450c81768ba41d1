"""From records to a report."""

import os
from pathlib import Path
from urllib.parse import quote

from fabric_jax.files import write_atomically
from fabric_jax.report.biomed import accuracy_blocks, smallest_epoch_blocks
from fabric_jax.report.claims import all_verdicts
from fabric_jax.report.document import Block, Heading, Picture, Text
from fabric_jax.report.figures import memory_picture, rank_picture, speed_picture
from fabric_jax.report.generic import experiment_section
from fabric_jax.report.html import to_html
from fabric_jax.report.markdown import to_markdown
from fabric_jax.report.published import RANK_NOTE, citation
from fabric_jax.report.records_index import Index
from fabric_jax.report.tables import decode_tables, epoch_tables, lossless_tables, memory_tables
from fabric_jax.sweeps.records import read_folder


def write_report(records: Path, out: Path) -> list[Path]:
    """Writes ``report.md`` with its figures, and ``report.html``, which needs nothing else.

    Args:
        records: folder of records.
        out: folder to write into; links in the Markdown are relative to it.

    Returns:
        The files written.

    Raises:
        FabricError: no records, a damaged one, or the folder can't be written.
    """
    index = Index(tuple(read_folder(records)))
    blocks = make_blocks(index)
    written: list[Path] = []

    def write(name: str, text: str) -> None:
        write_atomically(out / name, text.encode())
        written.append(out / name)

    for block in blocks:
        if isinstance(block, Picture):
            write(f"figures/{block.name}.svg", block.svg + "\n")
    write("report.md", to_markdown(blocks, index, base=_relative(records, out)))
    write("report.html", to_html(blocks, index))
    return written


def make_blocks(index: Index) -> list[Block]:
    """The report's content."""
    count = len(index.records)
    failed = sum(record.status != "ok" for record in index.records)
    blocks: list[Block] = [
        Heading(text="What was published, and what was measured", level=1),
        Text(
            text=f"Made from {count} records ({count - failed} results, {failed} cells that ran "
            "out of memory, crashed, ran out of time or don't exist on their platform) and nothing "
            "else. Every figure of ours links to its record, which has the command that makes it "
            "again; * marks what a compiler planned and nothing ran. Published figures: "
            f"{citation()}."
        ),
        Heading(text="Verdicts"),
        *all_verdicts(index),
    ]
    sections: list[tuple[str, list[Block]]] = [
        ("Memory", _with(memory_picture(index), memory_tables(index))),
        (
            "Speed of fine-tuning",
            _with(speed_picture(index), [*smallest_epoch_blocks(index), *epoch_tables(index)]),
        ),
        ("Speed of generation", decode_tables(index)),
        ("Lossless", lossless_tables(index)),
        ("Accuracy", _accuracy(index)),
    ]
    for name, section in sections:
        if section:
            blocks += [Heading(text=name), *section]
    blocks.append(Heading(text="All experiments"))
    for experiment in index.experiments():
        blocks += experiment_section(index, experiment)
    return blocks


def _accuracy(index: Index) -> list[Block]:
    table = accuracy_blocks(index)
    note = Text(text=RANK_NOTE, small=True)
    return _with(rank_picture(index), [*table, note]) if table else []


def _with(picture: Picture | None, blocks: list[Block]) -> list[Block]:
    return blocks if picture is None else [picture, *blocks]


def _relative(records: Path, out: Path) -> str:
    """The folder of records as seen from the report."""
    inside = os.path.relpath(records.resolve(), out.resolve())
    return "" if inside == "." else f"{quote(inside)}/"
