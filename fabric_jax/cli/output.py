"""Numbers and tables as the commands print them."""

import json
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def bytes_text(count: int | None) -> str:
    """``1536`` as ``1.50 KiB``, three digits; unknown as a dash."""
    if count is None:
        return "-"
    value, unit = float(count), 0
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    while value >= 1024 and unit < len(units) - 1:
        value, unit = value / 1024, unit + 1
    digits = max(0, 3 - len(str(int(value))))
    return f"{count} B" if unit == 0 else f"{value:.{digits}f} {units[unit]}"


def count_text(count: int) -> str:
    """``128351232`` as ``128.4M``."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.2f}{letter}" if size == 10**9 else f"{count / size:.1f}{letter}"
    return str(count)


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1
) -> None:
    """A titled table on standard output; columns after the first ``left`` ones are numbers."""
    table = Table(
        box=box.SIMPLE_HEAD,
        show_header=any(columns),
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for index, column in enumerate(columns):
        justify = "left" if index < left else "right"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    out = console()
    out.print(f"\n{title}", soft_wrap=True)
    out.print(table)


def console() -> Console:
    """Standard output. Where it is no terminal, lines are as long as they need to be."""
    out = Console(highlight=False, markup=False)
    return out if out.is_terminal else Console(highlight=False, markup=False, width=200)


def print_json(value: Any) -> None:
    """``value`` as indented JSON on standard output."""
    print(json.dumps(value, indent=2))
