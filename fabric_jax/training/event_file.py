"""TensorBoard events, written by the thread that has them.

tensorboardX's own writer is a thread behind a queue whose waiting is reckoned with the wall clock:
set back by some weeks, it ends the thread, and the training loop waits for the full queue for ever.
Errors of writing, too, would stay in that thread.
"""

import socket
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from fabric_jax.errors import FabricError

FLUSH_SECONDS = 30.0


class EventFile:
    """A file of scalars in a folder of TensorBoard's.

    Args:
        folder: made where it doesn't exist.
        purge_step: TensorBoard forgets what earlier files have from this step on; 0 for nothing.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        """Opens a file that is read after those that are there.

        Raises:
            FabricError: tensorboardX is not installed.
            OSError: the file can't be written, as in every other method.
        """
        self._events, record_writer = _import_tensorboardx()
        folder.mkdir(parents=True, exist_ok=True)
        # The wall clock may be set at any time; a run goes through its steps in one direction.
        self._zero = max(time.time(), _newest(folder) + 1) - time.monotonic()
        name = f"events.out.tfevents.{int(self._now()):010d}.{socket.gethostname()}"
        self._writer = record_writer.RecordWriter(str(folder / name))
        self._flushed = time.monotonic()
        self._write(file_version="brain.Event:2")
        if purge_step:
            start = self._events.SessionLog.START
            self._write(step=purge_step, session_log=self._events.SessionLog(status=start))
        self.flush()

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Adds a value; readers see it half a minute later at most, if others follow."""
        from tensorboardX.summary import scalar

        self._write(step=step, summary=scalar(name, value))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Returns when everything is on disk."""
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes and closes the file."""
        try:
            self.flush()
        finally:
            self._writer.close()

    def _write(self, **fields: Any) -> None:
        event = self._events.Event(wall_time=self._now(), **fields)
        self._writer.write(event.SerializeToString())

    def _now(self) -> float:
        """Seconds since 1970 that never go back."""
        return self._zero + time.monotonic()


def _newest(folder: Path) -> int:
    """The time in the name of the newest file: TensorBoard reads files in the order of names."""
    times = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")]
    return max((int(text) for text in times if text.isdigit()), default=0)


def _import_tensorboardx() -> tuple[Any, Any]:
    """Its events and its file of records."""
    try:
        with _torch_hidden():
            from tensorboardX import record_writer
            from tensorboardX.proto import event_pb2
    except ImportError as error:
        raise FabricError(
            "tensorboardX is not installed",
            fix="Install it (pip install tensorboardX) or give --no-tensorboard",
        ) from error
    return event_pb2, record_writer


@contextmanager
def _torch_hidden() -> Generator[None]:
    """Keeps tensorboardX from importing torch, which it does where it finds it.

    That would cost seconds and 180 MiB, for tensors that are never given to it.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = cast(ModuleType, None)
    try:
        yield
    finally:
        del sys.modules["torch"]
