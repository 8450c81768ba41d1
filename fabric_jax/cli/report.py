"""``fabric-jax report``: tables, verdicts and figures from the records of sweeps."""

import argparse
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = """\
Makes report.md (with figures/) and report.html, one page that needs nothing else, from the records
under DIR and nothing else: published tables beside ours, a verdict for each published claim, and
table and figure of every experiment.
"""


def run(arguments: Sequence[str]) -> int:
    """Parses, reports, prints what was written."""
    parser = argparse.ArgumentParser(
        prog="fabric-jax report",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("records", nargs="?", default="", metavar="DIR", help="of records")
    parser.add_argument("--out", default="", metavar="DIR", help="default: where the records are")
    given = parser.parse_args(arguments)
    from fabric_jax.errors import FabricError
    from fabric_jax.report.build import write_report

    if not given.records:
        raise FabricError("no folder of records", fix="Give the --out folder of a sweep")
    folder = Path(given.records)
    for path in write_report(folder, Path(given.out or folder)):
        print(path)
    return 0
