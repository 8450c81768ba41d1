"""``fabric-jax sweep``: the cells of an experiment, each measured in a process of its own."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

if TYPE_CHECKING:
    from fabric_jax.sweeps.runner import SweepOptions, Task

DESCRIPTION = """\
Measures the cells of an experiment, one process a cell, one record (JSON) a cell. Cells that have a
record are skipped, so a sweep that was killed goes on where it was.

settings are key=value: set in every cell. key=a,b is two values, key=a+b one tuple.
"""


def run(arguments: Sequence[str]) -> int:
    """Parses, sweeps, bundles; 1 where a cell crashed."""
    given = _parser().parse_intermixed_args(arguments)
    options = _options(given)
    if given.list:
        return _list(options)
    from fabric_jax.sweeps.board import make_board
    from fabric_jax.sweeps.runner import sweep

    try:
        tasks = sweep(options, make_board())
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            "interrupted; the same command measures all cells again, until then each has the "
            "record that it had"
            if options.rerun == "all"
            else "interrupted; the same command goes on, cells with a record are kept"
        ) from stop
    if given.bundle:
        _bundle(Path(options.out), Path(given.bundle))
    return int(any(task.record is not None and task.record.status == "crash" for task in tasks))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fabric-jax sweep",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="EXPERIMENT [key=value ...]",
        help="dotted name of its module (experiments.vram), then settings",
    )
    parser.add_argument("--platform", default="", help="default: cuda where there is one, else cpu")
    parser.add_argument("--out", default="", metavar="DIR", help="where records are kept; needed")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cells at a time")
    parser.add_argument(
        "--devices",
        default="",
        metavar="I,J,...",
        help="GPUs to use at once, --jobs cells on each; a cell sees one",
    )
    parser.add_argument(
        "--rerun",
        choices=("none", "failed", "stale", "all"),
        default="none",
        help="which cells with a record run again; stale: made by other code",
    )
    parser.add_argument("--timeout", type=float, default=0.0, metavar="SECONDS", help="of a cell")
    parser.add_argument(
        "--memory-gib",
        type=float,
        default=0.0,
        metavar="GIB",
        help="of a cell, resident, at most",
    )
    parser.add_argument(
        "--cache", default="", metavar="DIR", help="compiled programs that cells and sweeps share"
    )
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="run at most N cells now")
    parser.add_argument("--bundle", metavar="FILE", help="all records of DIR in one .jsonl")
    parser.add_argument("--list", action="store_true", help="print the cells, run nothing")
    return parser


def _options(given: argparse.Namespace) -> "SweepOptions":
    from fabric_jax.errors import FabricError
    from fabric_jax.sweeps.runner import Rerun, SweepOptions

    assert given.rerun in get_args(Rerun)
    if not given.words:
        raise FabricError("no experiment", expected=_known() or "a module's dotted name")
    if not given.out:
        raise FabricError("no folder for the records", fix="Give --out DIR")
    if min(given.timeout, given.memory_gib, given.limit) < 0:
        raise FabricError("--timeout, --memory-gib and --limit are 0 or more")
    return SweepOptions(
        experiment=given.words[0],
        platform=given.platform or _platform(),
        out=given.out,
        overrides=tuple(given.words[1:]),
        jobs=given.jobs,
        devices=tuple(given.devices.split(",")) if given.devices else (),
        rerun=given.rerun,
        timeout=given.timeout,
        memory_gib=given.memory_gib,
        cache=given.cache,
        limit=given.limit,
    )


def _known() -> str:
    """Experiments in the folder of that name here."""
    paths = sorted(Path("experiments").rglob("*.py"))
    wanted = ("\ndef config()", "\ndef cells(", "\ndef measure(cell")
    found = [path for path in paths if all(text in path.read_text() for text in wanted)]
    names = [".".join(path.with_suffix("").parts) for path in found]
    return f"one of {', '.join(names)}" if names else ""


def _platform() -> str:
    from fabric_jax.measurement.requirements import present_accelerators

    return "cuda" if "cuda" in present_accelerators() else "cpu"


def _list(options: "SweepOptions") -> int:
    from fabric_jax.sweeps.runner import plan

    _, tasks = plan(options)
    for task in tasks:
        print(f"{_state(task):13} {task.draft.name}")
    return 0


def _state(task: "Task") -> str:
    if task.record is None:
        return "-"
    return "STALE" if task.state == "stale" else task.record.status


def _bundle(folder: Path, file: Path) -> None:
    from fabric_jax.sweeps.records import read_folder, write_bundle

    records = [record for _, record in read_folder(folder)]
    write_bundle(file, sorted(records, key=lambda r: (r.experiment, r.platform, r.name)))
    print(f"{len(records)} records in {file}")
