"""A program in a pseudo terminal, used as a person would."""

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

# Makes standard input the controlling terminal, so that Ctrl-C is a signal.
_TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""


class Terminal:
    """Types into a program and reads what it shows."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        """Starts it with a terminal of its own for standard input, output and error."""
        self._own, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _TAKE_TERMINAL, *words],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=dict(environment),
            start_new_session=True,
        )
        os.close(theirs)
        self.shown = ""
        self._read = 0

    def wait_for(self, text: str, seconds: float = 180) -> str:
        """What is shown from the last match on up to ``text``; fails where it does not come."""
        end = time.monotonic() + seconds
        while text not in self.shown[self._read :]:
            ready = select.select([self._own], [], [], max(0.0, end - time.monotonic()))[0]
            assert ready, f"{text!r} does not come after: {self.shown[self._read :]!r}"
            try:
                self.shown += os.read(self._own, 65536).decode(errors="replace")
            except OSError:
                assert text in self.shown[self._read :], f"ended with: {self.shown!r}"
        at = self.shown.index(text, self._read) + len(text)
        part, self._read = self.shown[self._read : at], at
        return part

    def type(self, text: str) -> None:
        """Keys, as they are; ``\\x03`` is Ctrl-C, ``\\x04`` Ctrl-D."""
        os.write(self._own, text.encode())

    def wait_until_it_reads(self, seconds: float = 20) -> None:
        """Until the main thread sleeps, as it does where a prompt waits for keys.

        A signal between the showing of a prompt and the reading comes to readline only with the
        next key. No hand is that fast; a test is.
        """
        end = time.monotonic() + seconds
        state = Path(f"/proc/{self.process.pid}/stat")
        while state.read_text().rpartition(")")[2].split()[0] != "S":
            assert time.monotonic() < end, f"it does not sleep after: {self.shown[-200:]!r}"
            time.sleep(0.01)

    def leave(self, seconds: float = 20) -> int:
        """The exit code of a program that is ending."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            if select.select([self._own], [], [], 0.05)[0]:
                try:
                    self.shown += os.read(self._own, 65536).decode(errors="replace")
                except OSError:
                    break
        return self.process.wait(timeout=max(0.1, end - time.monotonic()))

    def close(self) -> None:
        """Ends the program where it has not ended."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._own)
