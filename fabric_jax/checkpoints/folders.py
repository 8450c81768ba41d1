"""Folders that appear whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fabric_jax.errors import FabricError
from fabric_jax.files import cannot_write


@contextmanager
def new_folder(folder: str | Path, *, replaces: frozenset[str]) -> Generator[Path]:
    """Yields an empty folder beside ``folder`` that takes its place when the block ends well.

    An earlier ``folder`` is replaced if it holds nothing but files of the same kind. Should the
    process die between the two renames which that takes, both folders lie beside each other under
    hidden names.

    Args:
        folder: the name that readers use.
        replaces: names of files that an earlier folder may hold.

    Raises:
        FabricError: the disk is full, the place can't be written, or ``folder`` holds something
            else; what was there is as it was.
    """
    folder = Path(folder).resolve()  # A link stays one.
    staged = None
    try:
        _require_replaceable(folder, replaces)
        folder.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        # mkdtemp makes private folders; models are shared like any other file.
        umask = os.umask(0)
        os.umask(umask)
        staged.chmod(0o777 & ~umask)
        yield staged
        for path in (*staged.iterdir(), staged):
            _sync(path)
        _swap(staged, folder)
        _sync(folder.parent)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        if staged is not None:
            shutil.rmtree(staged, ignore_errors=True)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FabricError: the file is missing, unreadable or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FabricError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise FabricError(f"{path} is not a JSON object", found=type(value).__name__)
    return value


def _require_replaceable(folder: Path, replaces: frozenset[str]) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FabricError(f"{folder} is a file", expected="a folder, or nothing yet")
    if folder.is_mount():
        raise FabricError(
            f"{folder} is where a disk is mounted, which can't be replaced",
            fix="Choose a folder in it",
        )
    others = sorted(path.name for path in folder.iterdir() if path.name not in replaces)
    if others:
        raise FabricError(
            f"{folder} holds other files, which saving here would remove",
            found=", ".join(others[:5]) + (" …" if len(others) > 5 else ""),
            fix="Choose a new or empty folder",
        )


def _swap(staged: Path, folder: Path) -> None:
    """Renames ``staged`` to ``folder``, an earlier one of that name going out of the way first."""
    if not folder.exists():
        staged.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    try:
        folder.rename(old)  # Onto an empty folder, which rename may replace.
    except OSError:
        old.rmdir()
        raise
    try:
        staged.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Waits until a file or folder is on the disk, where the platform lets it be opened."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
