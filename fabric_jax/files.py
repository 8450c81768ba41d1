"""Writing files so that a reader sees the old content or the new, never a part of it."""

import json
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fabric_jax.errors import FabricError


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes to a temporary file beside ``path``, syncs it, then renames it into place.

    Raises:
        FabricError: the folder can't be written or the disk is full; ``path`` is as it was.
    """
    with new_file(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def new_file(path: str | Path) -> Generator[Path]:
    """Yields an empty file beside ``path`` that takes its place when the block ends well.

    Raises:
        FabricError: the folder can't be written or the disk is full; ``path`` is as it was.
    """
    temporary = None
    try:
        path = _behind_links(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(descriptor)
        temporary = Path(name)
        # mkstemp makes private files; models are shared like any other file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def alone(path: str | Path) -> Generator[None]:
    """Waits until no other process is within the context for this file, which is made and stays.

    The operating system ends it with the process.

    Raises:
        FabricError: the file can't be made.
    """
    import fcntl

    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def require_writable(path: str | Path) -> None:
    """Finds out before a long computation whether its result can be written to ``path``.

    Raises:
        FabricError: no file can be made there.
    """
    try:
        path = _behind_links(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", dir=path.parent):
            pass
    except OSError as error:
        raise cannot_write(path, error) from error


def write_json(path: str | Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def cannot_write(path: str | Path, error: OSError) -> FabricError:
    """The message for a failed write."""
    return FabricError(
        f"cannot write {path}: {error.strerror or error}",
        fix="Free space or choose another folder; what was saved before is untouched",
    )


def _behind_links(path: str | Path) -> Path:
    """Where the file of this name is or will be; links to it stay.

    Raises:
        FabricError: a folder, a device or a pipe is there, which no file may take the place of.
    """
    place = Path(path).resolve()
    if place.exists() and not place.is_file():
        raise FabricError(f"cannot write {path}: it exists and is no file", fix="Choose a new name")
    return place


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable, where the platform lets folders be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
