"""SIGKILL of one of several processes that train together, for ``faults``."""

import socket
from pathlib import Path

from experiments.fault_kills import Counts, Runs
from experiments.fault_processes import (
    PATIENCE,
    Ended,
    Forked,
    Workshop,
    digest,
    note,
)
from fabric_jax.parallel.processes import LOST_CODE, WRONG_CODE

HEARTBEAT, MEETING = 10, 30
"""Seconds."""


class Group:
    """A run of several processes, with the manners of one (``Forked``).

    Args:
        workshop: starts them.
        words: of the command.
        count: how many.
    """

    def __init__(self, workshop: Workshop, words: list[str], count: int) -> None:
        """Starts them on a free port of this machine."""
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        meeting = ["--coordinator", f"localhost:{port}", "--processes", str(count)]
        meeting += ["--heartbeat-seconds", str(HEARTBEAT), "--meeting-seconds", str(MEETING)]
        self.all: list[Forked] = [
            workshop.start([*words, *meeting, "--process", str(number)]) for number in range(count)
        ]
        self._dice, self.victim = workshop.dice, -1

    def poll(self) -> int | None:
        """An exit code of one that has ended, None as long as all run."""
        codes = [one.poll() for one in self.all]
        return next((code for code in codes if code is not None), None)

    def kill(self) -> bool:
        """Whether the one that the dice chose was still running when it was killed."""
        victim = self._dice.randrange(len(self.all))
        if any(one.poll() is not None for one in self.all) or not self.all[victim].kill():
            return False
        self.victim = victim
        return True

    def wait(self) -> Ended:
        """The end of the first; of all where one hung or failed."""
        ends = self.ends()
        worst = next((end for end in ends if end.code != 0), ends[0])
        return Ended(code=worst.code, text=ends[0].text, seconds=max(e.seconds for e in ends))

    def ends(self) -> list[Ended]:
        """Of all."""
        return [one.wait() for one in self.all]


class Groups(Runs):
    """One run after another of several processes, of which one is killed until they are through.

    Args:
        workshop: what to train.
        count: processes.
    """

    def __init__(self, workshop: Workshop, count: int) -> None:
        """Trains once without a disturbance."""
        super().__init__(workshop, f"{count} processes", save_every=4)
        self.count = count
        self.output = workshop.scratch / f"of_{count}"
        self.words = self._command(self.output)
        whole = workshop.scratch / f"whole_of_{count}"
        ended = Group(workshop, self._command(whole), count).wait()
        if ended.code != 0:
            raise RuntimeError(f"exit code {ended.code}:\n{ended.text}")
        self.seconds = ended.seconds
        self.reference = digest(whole / "adapter"), digest(whole / "adapter_best")

    def attempt(self, counts: Counts, problems: list[str]) -> None:
        """As of one process; and those that were not killed say what happened, and end."""
        super().attempt(counts, problems)
        group = self.last
        if not isinstance(group, Group) or group.victim < 0:
            return
        for number, end in enumerate(group.ends()):
            if number == group.victim:
                continue
            what = f"{self.kind}: {number}, when {group.victim} died"
            if end.code is None or end.seconds > PATIENCE:
                note(counts, problems, "hangs", what, end.text)
            elif (end.code, True) not in (
                (LOST_CODE, "lost the others" in end.text),
                (WRONG_CODE, "don't meet" in end.text),
            ):
                note(counts, problems, "unclear_messages", f"{what}, code {end.code}", end.text)

    def _start(self) -> Group:
        return Group(self.shop, self.words, self.count)

    def _command(self, output: Path) -> list[str]:
        words = self.shop.finetune(output, save_every=4)
        words[words.index("--batch-size") + 1] = "4"
        return words
