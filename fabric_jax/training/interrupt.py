"""Ctrl-C and SIGTERM: finish the step, save, leave."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal after saving; the message says how to resume it.

    Args:
        message: for the user.
        number: the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        """Keeps the exit code that shells give a process stopped by this signal."""
        super().__init__(message)
        self.exit_code = 128 + number


class Interrupts:
    """Inside this context the first signal is only noted, the second ends the process at once.

    Python runs signal handlers between bytecodes, so not while the main thread waits for a long
    step. The C-level wake-up descriptor is written at once, and a thread reads it.

    Args:
        notify: called from that thread with the number of the first signal.
    """

    def __init__(self, notify: Callable[[int], None]) -> None:
        """Installs nothing yet."""
        self.received: int | None = None
        self._notify = notify
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupts":
        """Installs the handlers; only the main thread of a process may have them."""
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous_descriptor = signal.set_wakeup_fd(self._writer.fileno())
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, _do_nothing)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Restores what was there before."""
        if not self._previous:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        signal.set_wakeup_fd(self._previous_descriptor)
        self._writer.close()
        self._thread.join()
        self._reader.close()

    def _watch(self) -> None:
        """Reads signal numbers, one byte each, until the other end is closed."""
        while received := self._reader.recv(1):
            number = received[0]
            if number not in SIGNALS:
                continue
            if self.received is not None:
                print("stopped at once; the last checkpoint is intact", file=sys.stderr, flush=True)
                os._exit(128 + number)
            self.received = number
            self._notify(number)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """A handler must exist for the wake-up descriptor to be written."""
