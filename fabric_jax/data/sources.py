"""Records from local files and from the hub, in order, one at a time."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from fabric_jax.data.stdlib import STDLIB, stdlib_documents
from fabric_jax.errors import FabricError, unknown_name

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
# File names that say which part of a data set a folder's file is.
_SPLIT_NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "eval"),
}
_HUB_ID = re.compile(
    r"^(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?(:(?P<split>.+))?$"
)


class Record(NamedTuple):
    """One row as it was written, and its place."""

    where: str
    values: Mapping[str, Any]


class HubSource(NamedTuple):
    """A data set of the Hugging Face hub; None is the hub's default."""

    name: str
    configuration: str | None
    revision: str | None
    split: str


def read_records(source: str, *, split: str) -> Iterator[Record]:
    """Yields the records of a file, a folder or a hub data set.

    Args:
        source: a path, a folder (``folder:split`` for one of its parts),
            ``org/name[/configuration][@revision][:split]``, or ``stdlib``, Python's own library.
        split: the part to read where ``source`` names none.

    Raises:
        FabricError: nothing there, unreadable, empty, or malformed (with file, line and reason).
    """
    if source == STDLIB:
        for name, text in stdlib_documents():
            yield Record(f"{STDLIB}/{name}", {"text": text})
        return
    path = Path(source).expanduser()
    folder, _, part = source.rpartition(":")
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = _files_of(path, split)
    elif folder and Path(folder).expanduser().is_dir():
        files = _files_of(Path(folder).expanduser(), part)
    else:
        yield from _read_hub(source, split)
        return
    found = False
    for file in files:
        for record in _read_file(file):
            found = True
            yield record
    if not found:
        raise FabricError(f"no rows in {source}", found="an empty file or folder")


def _files_of(folder: Path, split: str) -> list[Path]:
    """The folder's data files, those of one split where names tell splits apart."""
    files = sorted(f for f in folder.iterdir() if f.suffix in SUFFIXES and f.is_file())
    if not files:
        raise FabricError(f"no data files in {folder}", expected=f"files named *{{{_suffixes()}}}")
    parts = {file: _part_of(file) for file in files}
    if not any(parts.values()):
        return files
    chosen = [file for file in files if parts[file] == _part_of(Path(split))]
    if not chosen:
        raise unknown_name(f"part of {folder}", split, sorted({p for p in parts.values() if p}))
    return chosen


def _part_of(file: Path) -> str | None:
    """The split a file name starts with: "validation" for ``val-00.jsonl``."""
    word = re.split(r"[^a-z]", file.name.lower(), maxsplit=1)[0]
    return next((part for part, names in _SPLIT_NAMES.items() if word in names), None)


def _read_file(path: Path) -> Iterator[Record]:
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
    elif path.suffix in SUFFIXES:
        try:
            if path.suffix == ".json" and _starts_array(path):
                yield from _read_json_array(path)
            else:
                yield from _read_json_lines(path)
        except OSError as error:
            raise FabricError(f"cannot read {path}: {error.strerror or error}") from error
    else:
        raise FabricError(
            f"cannot read {path}", expected=f"a name ending in {_suffixes()}", found=path.suffix
        )


def _starts_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _read_json_lines(path: Path) -> Iterator[Record]:
    """One object a line; blank lines are passed over."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield Record(where, _as_object(_parse(line, where), where))


def _parse(line: bytes, where: str) -> object:
    try:
        value = json.loads(line.decode("utf-8"))
        _check_characters(value, where, escaped=b"\\ud" in line.lower())
        return value
    except UnicodeDecodeError as error:
        reason = f"byte {error.start + 1} is not UTF-8"
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:  # a number of more digits than Python reads
        reason = str(error)
    raise FabricError(f"{where} is not JSON: {reason}", fix="Correct or remove this line")


def _read_json_array(path: Path) -> Iterator[Record]:
    """An array of objects; a single object a line is what large files should use."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = json.loads(text)
    except UnicodeDecodeError as error:
        raise FabricError(f"{path} is not UTF-8: {error}") from error
    except json.JSONDecodeError as error:
        raise FabricError(
            f"{path}, line {error.lineno} is not JSON: {error.msg} at column {error.colno}"
        ) from error
    except RecursionError as error:
        raise FabricError(f"{path} is not JSON: nested too deeply") from error
    except ValueError as error:  # a number of more digits than Python reads
        raise FabricError(f"{path} is not JSON: {error}") from error
    escaped = "\\ud" in text.lower()
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        _check_characters(row, where, escaped=escaped)
        yield Record(where, _as_object(row, where))


def _check_characters(value: object, where: str, *, escaped: bool) -> None:
    """Refuses half of a surrogate pair, which JSON can write as an escape and UTF-8 can't hold.

    Raises:
        FabricError: there is one.
    """
    if not escaped:
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise FabricError(
            f"{where} holds half of a surrogate pair, which is no character",
            found=f"\\u{ord(half):04x}",
            fix="Correct or remove this row",
        ) from error


def _as_object(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise FabricError(
            f"{where} is not a row", expected="an object with named values", found=repr(value)[:60]
        )
    return cast(dict[str, Any], value)


def _read_parquet(path: Path) -> Iterator[Record]:
    """Streams the table, so that no second copy of it lands in a cache."""
    import datasets

    try:
        table = datasets.load_dataset(
            "parquet", data_files=str(path.absolute()), split="train", streaming=True
        )
        for number, row in enumerate(table, 1):
            yield Record(f"{path}, row {number}", cast(dict[str, Any], row))
    except FabricError:
        raise
    except Exception as error:  # arrow, fsspec and datasets each raise their own
        raise FabricError(
            f"cannot read {path}", expected="a Parquet file", found=_first_line(error)
        ) from error


def parse_hub_id(source: str, *, split: str) -> HubSource | None:
    """Reads ``org/name[/configuration][@revision][:split]``, None for what is a path."""
    match = _HUB_ID.match(source)
    if match is None or source.startswith(".") or source.endswith(SUFFIXES):
        return None
    return HubSource(match["name"], match["config"], match["revision"], match["split"] or split)


def records_of(table: Any, name: str) -> Iterator[Record]:
    """The rows of a map-style data set, classes by their names rather than their numbers."""
    import datasets

    features: Mapping[str, Any] = table.features
    classes = {k: f.names for k, f in features.items() if isinstance(f, datasets.ClassLabel)}
    for number, row in enumerate(table, 1):
        # Rows whose class is unknown have -1.
        named = {
            k: None if row[k] is None or row[k] < 0 else names[row[k]]
            for k, names in classes.items()
        }
        yield Record(f"{name}, row {number}", cast(dict[str, Any], row) | named)


def _read_hub(source: str, split: str) -> Iterator[Record]:
    hub = parse_hub_id(source, split=split)
    if hub is None:
        raise FabricError(
            f"no file {source}",
            expected=f"a file ({_suffixes()}), a folder of them, or a hub data set org/name",
        )
    import datasets

    try:
        table = datasets.load_dataset(
            hub.name, hub.configuration, revision=hub.revision, split=hub.split
        )
    except Exception as error:  # hub, network and builder errors share no base class
        raise FabricError(
            f"cannot load {source} from the hub ({_first_line(error)}), "
            "and there is no such file or folder here",
            fix="Check name, split and connection, or give a local file",
        ) from error
    yield from records_of(table, f"{hub.name}:{hub.split}")


def _suffixes() -> str:
    return ", ".join(SUFFIXES)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
