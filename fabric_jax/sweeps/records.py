"""A cell's record: one JSON object, checked when it is written and when it is read.

``docs/records.md`` documents the schema. A folder of records holds ``*.json`` files of one record
and ``*.jsonl`` bundles of one record a line.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

from fabric_jax.errors import FabricError
from fabric_jax.files import write_atomically
from fabric_jax.sweeps.experiment import Figure

SCHEMA = 1
KINDS = ("run", "compiled", "lowered")
STATUSES = ("ok", "out_of_memory", "crash", "timeout", "unsupported")


@dataclass(frozen=True, kw_only=True)
class Record:
    """What came of one cell.

    Attributes:
        schema: version of this layout.
        experiment: name of the experiment.
        question: what it asks.
        name: of the cell: the settings that tell it from the others.
        platform: what it was for.
        kind: whether programs ran, were compiled only, or were lowered only.
        status: ``ok``, or the way in which the cell failed, which is a result too.
        cell: all settings.
        metrics: what was measured, units in the names (``_bytes``, ``_seconds``).
        detail: what is to be said of a failure; None where there was none.
        digest: of experiment, platform and cell: what this is the record of.
        code: digest of the sources that made it.
        command: makes this record again.
        started: UTC, ISO 8601.
        seconds: wall time of the process.
        environment: variables that were set for it.
        device: where it ran, with versions of packages and driver.
        figure: how the experiment's records are drawn; None where it doesn't say.
        columns: metrics that a table shows; empty for all.
    """

    schema: int = SCHEMA
    experiment: str
    question: str
    name: str
    platform: str
    kind: str
    status: str
    cell: dict[str, Any]
    metrics: dict[str, Any]
    detail: str | None
    digest: str
    code: str
    command: str
    started: str
    seconds: float
    environment: dict[str, str]
    device: dict[str, Any]
    figure: dict[str, str] | None
    columns: list[str]

    def to_json(self) -> dict[str, Any]:
        """Field to value."""
        return asdict(self)


TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "schema": ((int,), "a whole number"),
    "seconds": ((int, float), "a number"),
    "detail": ((str, type(None)), "text or null"),
    "figure": ((dict, type(None)), "an object or null"),
    "columns": ((list,), "a list"),
    **dict.fromkeys(("cell", "metrics", "environment", "device"), ((dict,), "an object")),
}
"""Of the keys that aren't text."""


def record_from_json(values: Any, where: str) -> Record:
    """A record, checked.

    Args:
        values: parsed JSON.
        where: file and line, for messages.

    Raises:
        FabricError: a key is missing, unknown or has a wrong value, or the schema is another one.
    """
    if not isinstance(values, dict) or "schema" not in values:
        raise FabricError(
            f"{where} is no record of a sweep", expected="a JSON object with a schema"
        )
    given = cast(dict[str, Any], values)
    if given["schema"] != SCHEMA:
        raise FabricError(
            f"{where} has another schema",
            expected=str(SCHEMA),
            found=str(given["schema"]),
            fix="Run the sweep again, or read it with the version that wrote it",
        )
    known = [field.name for field in fields(Record)]
    for key in known:
        if key not in given:
            raise FabricError(f"{where}: the record lacks {key!r}")
    for key, value in given.items():
        if key not in known:
            raise FabricError(f"{where}: a record has no {key!r}", expected=", ".join(known))
        kinds, words = TYPES.get(key, ((str,), "text"))
        if not isinstance(value, kinds) or (isinstance(value, bool)):
            raise FabricError(f"{where}: {key}", expected=words, found=repr(value)[:80])
    for key, allowed in (("kind", KINDS), ("status", STATUSES)):
        if given[key] not in allowed:
            raise FabricError(
                f"{where}: {key}", expected=f"one of {', '.join(allowed)}", found=repr(given[key])
            )
    _check_numbers(given["metrics"], f"{where}: metrics")
    _check_figure(given["figure"], f"{where}: figure")
    return Record(**given)


def write_record(path: Path, record: Record) -> None:
    """Writes a record whole or not at all.

    Raises:
        FabricError: it is not one, or the file can't be written.
    """
    record_from_json(record.to_json(), str(path))
    write_atomically(path, (json.dumps(record.to_json(), indent=1) + "\n").encode())


def read_record(path: Path) -> Record:
    """The record in a file of its own.

    Raises:
        FabricError: it can't be read or is none.
    """
    return record_from_json(_parse(path.read_bytes(), str(path)), str(path))


def read_folder(folder: Path) -> list[tuple[str, Record]]:
    """All records under a folder, each with where it stands (``file`` or ``file#Lline``).

    Where two have the same digest the one that was started later counts.

    Raises:
        FabricError: no such folder, no record in it, or a file that holds something else.
    """
    if not folder.is_dir():
        raise FabricError(f"no folder {folder}", fix="Give the --out folder of a sweep")
    found: dict[str, tuple[str, Record]] = {}
    for where, record in _all(folder):
        other = found.get(record.digest)
        if other is None or other[1].started <= record.started:
            found[record.digest] = (where, record)
    if not found:
        raise FabricError(f"no records under {folder}", fix="Give the --out folder of a sweep")
    return list(found.values())


def write_bundle(path: Path, records: Iterable[Record]) -> None:
    """Writes records as one file, a line each."""
    lines = [json.dumps(r.to_json(), separators=(",", ":")) for r in records]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def _all(folder: Path) -> Iterator[tuple[str, Record]]:
    for path in sorted(folder.rglob("*.json*")):
        where = str(path.relative_to(folder))
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.suffix == ".json":
            yield where, read_record(path)
        elif path.suffix == ".jsonl":
            for number, line in enumerate(path.read_bytes().splitlines(), 1):
                place = f"{path}, line {number}"
                yield f"{where}#L{number}", record_from_json(_parse(line, place), place)


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode())
    except ValueError as error:
        raise FabricError(f"{where} is no JSON: {error}", fix="Delete it and resume") from error


def _check_numbers(value: Any, where: str) -> None:
    """Metrics are JSON: text, finite numbers, and lists and tables of these."""
    if isinstance(value, dict):
        for key, own in cast(dict[str, Any], value).items():
            _check_numbers(own, f"{where}: {key}")
    elif isinstance(value, list):
        for own in cast(list[Any], value):
            _check_numbers(own, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise FabricError(where, expected="a finite number or null", found=f"{value}")
    elif not isinstance(value, str | int | float | type(None)):
        raise FabricError(where, expected="JSON", found=type(value).__name__)


def _check_figure(values: dict[str, Any] | None, where: str) -> None:
    try:
        if values is not None:
            Figure(**values)
    except (TypeError, FabricError) as error:
        raise FabricError(where, expected="the fields of a Figure", found=repr(values)) from error
