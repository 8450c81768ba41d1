"""SIGKILL at random moments of training, checkpointing, exporting and sweeping, for ``faults``."""

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any, Protocol

from experiments.fault_processes import (
    STEPS,
    Ended,
    Workshop,
    checkpoints,
    command,
    digest,
    last_step,
    note,
)

Counts = dict[str, Any]


class Run(Protocol):
    """What is killed."""

    def poll(self) -> int | None:
        """Its exit code, None as long as it runs."""
        ...

    def kill(self) -> bool:
        """Whether it was still running when it was killed."""
        ...

    def wait(self) -> Ended:
        """Until its end."""
        ...


RESUMED = re.compile(r"resuming after step (\d+)")
FORMATS = {
    "native": "model",
    "hf-packed": "hf",
    "hf-bf16": "bf16",
    "gguf-tq2_0": "model.gguf",
    "gguf-f16": "f16.gguf",
}
"""Name of the output by format of ``fabric-jax convert``."""
CELLS = 6
CELL_MODULE = '''"""Cells that wait a moment."""
import time
from dataclasses import dataclass, replace
from pathlib import Path

@dataclass(frozen=True)
class Cell:
    number: int = 0
    log: str = ""

def config():
    return Cell()

def cells(base):
    return [replace(base, number=number) for number in range({cells})]

def measure(cell):
    with Path(cell.log).open("a") as log:
        log.write(f"{{cell.number}}\\n")
    time.sleep(0.02)
    return {{"square": cell.number**2}}
'''


def read_end(ended: Ended, counts: Counts, problems: list[str], what: str) -> None:
    """Counts what is wrong with the end of a process that nobody killed."""
    if ended.code is None:
        note(counts, problems, "hangs", what, ended.text)
    elif ended.code not in (0, 2) or "Traceback" in ended.text:
        note(counts, problems, "unclear_messages", f"{what}, exit code {ended.code}", ended.text)


class Runs:
    """One run after another, each killed until it comes to its end.

    Args:
        workshop: what to train.
        kind: ``training``: killed at a random moment or after a random step; ``checkpointing``:
            while a checkpoint is being written.
        save_every: steps.
    """

    def __init__(self, workshop: Workshop, kind: str, *, save_every: int) -> None:
        """Nothing has run."""
        self.shop, self.kind, self.save_every = workshop, kind, save_every
        self.output = workshop.scratch / kind
        self.words = workshop.finetune(self.output, save_every=save_every)
        self.seconds, self.reference = workshop.seconds, workshop.reference

    def attempt(self, counts: Counts, problems: list[str]) -> None:
        """Starts the run, or goes on with it, and kills it."""
        before = checkpoints(self.output)
        run = self.last = self._start()
        self._wait(run)
        killed = run.kill()
        ended = run.wait()
        counts["kills"] = counts.get("kills", 0) + killed
        self._check_start(ended.text, before, counts, problems)
        if not killed:
            counts["ended_before"] = counts.get("ended_before", 0) + 1
            read_end(ended, counts, problems, self.kind)
            self._check_end(counts, problems)
            return
        kept, logged = max(checkpoints(self.output), default=0), last_step(self.output)
        lost = logged - kept
        counts["most_steps_repeated"] = max(counts.get("most_steps_repeated", 0), lost)
        # One checkpoint may be being written while the steps after it run.
        if lost > 2 * self.save_every:
            note(counts, problems, "lost_work", f"{self.kind}: {kept} kept of {logged} steps")

    def finish(self, counts: Counts, problems: list[str]) -> None:
        """Lets the last run come to its end."""
        if self.output.exists():
            before = checkpoints(self.output)
            ended = self._start().wait()
            self._check_start(ended.text, before, counts, problems)
            read_end(ended, counts, problems, self.kind)
            self._check_end(counts, problems)

    def _start(self) -> Run:
        return self.shop.start(self.words)

    def _wait(self, run: Run) -> None:
        dice, deadline = self.shop.dice, time.monotonic() + 60
        if self.kind == "checkpointing":
            # What an earlier kill left is there at once, and removed.
            seen, wanted = self._being_written(), dice.randint(1, 8)
            left = set(seen)
            while len(seen - left) < wanted and run.poll() is None and time.monotonic() < deadline:
                time.sleep(0.0003)
                seen |= self._being_written()
            time.sleep(dice.uniform(0, 0.02))
        elif dice.random() < 0.5:
            time.sleep(dice.uniform(0, self.seconds))
        else:
            step = dice.randint(1, STEPS)
            while last_step(self.output) < step and run.poll() is None:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.0005)
            time.sleep(dice.uniform(0, 0.03))

    def _being_written(self) -> set[str]:
        """Names of incomplete checkpoints."""
        folder = self.output / "checkpoints"
        names = os.listdir(folder) if folder.is_dir() else []
        return {name for name in names if not name.isdigit()}

    def _check_start(
        self, text: str, before: list[int], counts: Counts, problems: list[str]
    ) -> None:
        """The newest checkpoint that was complete is the one that is continued."""
        newest = max(before, default=0)
        if "is damaged" in text:
            note(counts, problems, "corrupted_outputs", f"{self.kind}: a checkpoint", text)
        if found := RESUMED.search(text):
            counts["resumed"] = counts.get("resumed", 0) + 1
            if int(found[1]) != newest:
                note(counts, problems, "lost_work", f"{self.kind}: {found[0]}, not {newest}")
        elif newest and "starting anew" in text:
            note(counts, problems, "lost_work", f"{self.kind}: began anew beside step {newest}")

    def _check_end(self, counts: Counts, problems: list[str]) -> None:
        """The adapters of a run that came to its end."""
        counts["runs_compared"] = counts.get("runs_compared", 0) + 1
        found = digest(self.output / "adapter"), digest(self.output / "adapter_best")
        lines = (self.output / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        if found != self.reference or steps != list(range(1, STEPS + 1)):
            note(counts, problems, "corrupted_outputs", f"{self.kind}: {found}, steps {steps}")
        shutil.rmtree(self.output)


class Exports:
    """Models written in every format, and the adapter of a finished run, over earlier ones."""

    def __init__(self, workshop: Workshop) -> None:
        """Writes each once, undisturbed."""
        self.shop, self.folder = workshop, workshop.scratch / "exports"
        self.jobs: list[tuple[list[str], Path]] = []
        for form, name in FORMATS.items():
            words = ["convert", str(workshop.model), str(self.folder / name), "--to", form]
            self.jobs.append((words, self.folder / name))
        run = self.folder / "run"
        shutil.copytree(workshop.whole, run)
        self.jobs.append((workshop.finetune(run, save_every=4), run / "adapter"))
        self.seconds: list[float] = []
        self.wanted: list[str | None] = []
        for words, path in self.jobs:
            ended = workshop.must(words)
            self.seconds.append(ended.seconds)
            self.wanted.append(digest(path))

    def attempt(self, counts: Counts, problems: list[str]) -> None:
        """Kills one export and looks at what is under its name."""
        number = self.shop.dice.randrange(len(self.jobs))
        (words, path), wanted = self.jobs[number], self.wanted[number]
        if self.shop.dice.random() < 0.3:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        there = path.exists()
        run = self.shop.start(words)
        time.sleep(self.shop.dice.uniform(0.0, self.seconds[number]))
        killed = run.kill()
        ended = run.wait()
        counts["kills"] = counts.get("kills", 0) + killed
        if not killed:
            counts["ended_before"] = counts.get("ended_before", 0) + 1
            read_end(ended, counts, problems, "exporting")
        found = digest(path)
        if found is None and (there or not killed):
            hidden = [digest(other) for other in path.parent.glob(f".{path.name}.*")]
            if wanted not in hidden:
                note(counts, problems, "lost_work", f"{path.name} is gone")
            # Between the two renames that replacing a folder takes.
            counts["under_hidden_name"] = counts.get("under_hidden_name", 0) + 1
        elif found not in (None, wanted):
            note(counts, problems, "corrupted_outputs", f"{path.name} is another")
        self._tidy(path)

    def finish(self, counts: Counts, problems: list[str]) -> None:
        """Every export succeeds after all that."""
        for (words, path), wanted in zip(self.jobs, self.wanted, strict=True):
            ended = self.shop.start(words).wait()
            read_end(ended, counts, problems, "exporting")
            if digest(path) != wanted:
                note(counts, problems, "corrupted_outputs", f"{path.name} at the end", ended.text)

    def _tidy(self, path: Path) -> None:
        """Removes what a killed process couldn't."""
        for other in path.parent.glob(f".{path.name}.*"):
            shutil.rmtree(other) if other.is_dir() else other.unlink()


class Sweeps:
    """Sweeps of cells that take a moment, killed until all have a record."""

    def __init__(self, workshop: Workshop) -> None:
        """Writes the experiment."""
        self.shop, self.folder = workshop, workshop.scratch / "sweeps"
        self.folder.mkdir()
        (self.folder / "toy_cells.py").write_text(CELL_MODULE.format(cells=CELLS))
        self.out, self.log = self.folder / "out", self.folder / "measured"
        self.seconds = self.shop.must(self._sweep).seconds
        self._anew()

    def attempt(self, counts: Counts, problems: list[str]) -> None:
        """Starts the sweep, or goes on with it, and kills it."""
        done, measured = self._records(counts, problems), self._measured()
        run = self.shop.start(self._sweep)
        time.sleep(self.shop.dice.uniform(0.0, 0.7 * self.seconds))
        killed = run.kill()
        ended = run.wait()
        counts["kills"] = counts.get("kills", 0) + killed
        again = set(self._measured()[len(measured) :]) & set(done)
        if again:
            note(counts, problems, "lost_work", f"cells {sorted(again)} ran again")
        if not killed:
            counts["ended_before"] = counts.get("ended_before", 0) + 1
            read_end(ended, counts, problems, "sweeping")
            self._check_end(counts, problems)

    def finish(self, counts: Counts, problems: list[str]) -> None:
        """Lets the last sweep come to its end."""
        ended = self.shop.start(self._sweep).wait()
        read_end(ended, counts, problems, "sweeping")
        self._check_end(counts, problems)

    def _sweep(self) -> int:
        os.chdir(self.folder)
        words = ["sweep", "toy_cells", "--platform", "cpu", "--out", str(self.out)]
        return command([*words, "--jobs", "2", f"log={self.log}"])

    def _measured(self) -> list[int]:
        return [int(n) for n in self.log.read_text().split()] if self.log.exists() else []

    def _records(self, counts: Counts, problems: list[str]) -> dict[int, Any]:
        """Metrics by cell."""
        from fabric_jax.errors import FabricError
        from fabric_jax.sweeps.records import read_folder

        if not any(self.out.rglob("toy_cells/*.json")):
            return {}
        try:
            records = [record for _, record in read_folder(self.out)]
        except FabricError as error:
            note(counts, problems, "corrupted_outputs", f"sweeping: {error}")
            return {}
        return {record.cell["number"]: record.metrics for record in records}

    def _check_end(self, counts: Counts, problems: list[str]) -> None:
        counts["runs_compared"] = counts.get("runs_compared", 0) + 1
        found = self._records(counts, problems)
        if found != {number: {"square": number**2} for number in range(CELLS)}:
            note(counts, problems, "corrupted_outputs", f"sweeping: {found}")
        self._anew()

    def _anew(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        self.log.unlink(missing_ok=True)
