"""Full disks and damaged checkpoints, for ``faults``."""

import shutil
from pathlib import Path
from typing import Any

from experiments.fault_kills import Counts, read_end
from experiments.fault_processes import Workshop, checkpoints, digest, note

LARGEST = 200_000
"""Bytes that no file of the job reaches."""


class FullDisk:
    """Runs in which no file may grow beyond a random size; then there is room again."""

    def __init__(self, workshop: Workshop) -> None:
        """Nothing has run."""
        self.shop, self.output = workshop, workshop.scratch / "full"

    def attempt(self, counts: Counts, problems: list[str]) -> None:
        """One run without room, one with it."""
        size = int(LARGEST ** self.shop.dice.random())
        words = self.shop.finetune(self.output, save_every=4)
        ended = self.shop.start(words, file_limit=size).wait()
        read_end(ended, counts, problems, f"disk full at {size} bytes")
        counts["stopped"] = counts.get("stopped", 0) + (ended.code == 2)
        found = digest(self.output / "adapter")
        if found not in (None, self.shop.reference[0]):
            note(counts, problems, "corrupted_outputs", f"disk full at {size} bytes: an adapter")
        again = self.shop.start(words).wait()
        check_run(self.shop, self.output, again.code, again.text, counts, problems)

    def finish(self, counts: Counts, problems: list[str]) -> None:
        """Nothing is left to do."""


class DamagedCheckpoints:
    """Runs that stop in the middle, whose newest checkpoint is then damaged in one place."""

    def __init__(self, workshop: Workshop) -> None:
        """Takes the finished run back to a step before its end."""
        self.shop, self.output = workshop, workshop.scratch / "damaged"

    def attempt(self, counts: Counts, problems: list[str]) -> None:
        """Damages one file, and goes on."""
        shutil.copytree(self.shop.whole, self.output)
        for name in ("adapter", "adapter_best", "summary.json"):
            path = self.output / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        newest = self.output / "checkpoints" / str(max(checkpoints(self.output)))
        file = self.shop.dice.choice(sorted(p for p in newest.rglob("*") if p.is_file()))
        how = self.shop.dice.choice(("a bit", "the end", "the file", "all zeros"))
        self._damage(file, how)
        ended = self.shop.start(self.shop.finetune(self.output, save_every=4)).wait()
        counts["noticed"] = counts.get("noticed", 0) + ("is damaged" in ended.text)
        check_run(
            self.shop, self.output, ended.code, ended.text, counts, problems, f"{file.name}: {how}"
        )

    def finish(self, counts: Counts, problems: list[str]) -> None:
        """Nothing is left to do."""

    def _damage(self, file: Path, how: str) -> None:
        content, dice = bytearray(file.read_bytes()), self.shop.dice
        match how:
            case "a bit" if content:
                content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
                file.write_bytes(content)
            case "the end":
                file.write_bytes(content[: dice.randrange(len(content) + 1)])
            case "all zeros":
                file.write_bytes(bytes(len(content)))
            case _:
                file.unlink()


def check_run(
    shop: Workshop,
    output: Path,
    code: int | None,
    text: str,
    counts: dict[str, Any],
    problems: list[str],
    what: str = "",
) -> None:
    """The run has come to its end with the adapter of an undisturbed one; it is removed.

    The adapter at the best evaluation is exported when that is measured: a session that begins
    after it doesn't write it again.
    """
    if code is None:
        note(counts, problems, "hangs", what, text)
    elif code != 0 or "Traceback" in text:
        note(counts, problems, "unclear_messages", f"{what}, exit code {code}", text)
    elif digest(output / "adapter") != shop.reference[0]:
        note(counts, problems, "corrupted_outputs", what, text)
    shutil.rmtree(output)
