"""One run an output folder."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from fabric_jax.errors import FabricError
from fabric_jax.files import cannot_write

LOCK = ".lock"


@contextmanager
def locked_folder(folder: Path) -> Generator[None]:
    """Makes ``folder`` and keeps other runs out of it for the time of the context.

    The operating system drops the lock when the process ends, however it ends; the file stays.

    Raises:
        FabricError: another process writes there, or the folder can't be made or written.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 32).decode(errors="replace").strip()
            raise FabricError(
                f"another run writes to {folder}" + (f" (process {holder})" if holder else ""),
                fix="Wait for it, stop it, or choose another output folder",
            ) from error
        except OSError as error:
            raise cannot_write(folder, error) from error
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)
