"""Runs and sweeps on a machine whose clock jumps: only time that can't go back is measured with."""

import itertools
import math
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fabric_jax.sweeps.records import read_folder
from fabric_jax.sweeps.runner import SweepOptions, sweep
from fabric_jax.training.config import FinetuneConfig
from fabric_jax.training.loop import finetune
from fabric_jax.training.summary import Summary
from tests.training.runs import adapter_bytes, crash_at_batch, metrics, steps_saved, timeless

pytestmark = [pytest.mark.usefixtures("compiled_once"), pytest.mark.xdist_group("training")]

YEAR = 365 * 86400.0


class JumpingClock:
    """The wall clock, which is set anew every time that it is read."""

    def __init__(self, patch: pytest.MonkeyPatch, around: float) -> None:
        self.read, self._dice = 0, random.Random(0)
        self._true, self._around = time.time, around
        patch.setattr(time, "time", self.time)
        patch.setattr(time, "time_ns", lambda: int(self.time() * 1e9))

    def time(self) -> float:
        self.read += 1
        return self._true() + self._around + self._dice.uniform(-YEAR, YEAR)


def test_a_run_whose_clock_jumps_goes_on_with_the_newest_checkpoint(
    whole: tuple[FinetuneConfig, Summary],
    tmp_path: Path,
    quiet: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It jumps all the time, and is three years back when the run goes on."""
    reference, _ = whole
    output = tmp_path / "run"
    config = replace(reference, output=str(output), save_every=2, keep_last=2)
    with monkeypatch.context() as patch:
        clock = JumpingClock(patch, 0.0)
        with crash_at_batch(8, monkeypatch):
            finetune(config, console=quiet)
    assert clock.read > 0
    newest = steps_saved(output)[-1]
    with monkeypatch.context() as patch, (tmp_path / "said").open("w") as said:
        JumpingClock(patch, -3 * YEAR)
        finetune(replace(config, resume="auto"), console=Console(file=said))
    assert f"resuming after step {newest} of" in (tmp_path / "said").read_text()
    assert adapter_bytes(output) == adapter_bytes(Path(reference.output))
    assert timeless(output) == timeless(Path(reference.output))
    assert steps_saved(output)[-1] == 8
    lines = metrics(output)
    for line in lines:
        for name, value in line.items():
            if name.endswith("_per_second") or name == "seconds":
                assert math.isfinite(value), name
                assert 0 < value < 1e9, name
    seconds = [line["seconds"] for line in lines]
    assert all(a <= b for a, b in itertools.pairwise(seconds))
    # TensorBoard reads files in the order of their names, and forgets steps by what comes later.
    events = sorted((output / "tensorboard").iterdir())
    assert len(events) == 2
    assert events == sorted(events, key=lambda path: path.stat().st_mtime_ns)


class Silent:
    def begin(self, tasks: object, jobs: int) -> None: ...

    def update(self, task: object) -> None: ...

    def end(self) -> None: ...


def test_a_sweep_whose_clock_jumps_times_out_no_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "sweeps"))
    JumpingClock(monkeypatch, 0.0)
    words = ("how=well", "seconds=0.1")
    options = SweepOptions(
        experiment="toy_experiment", platform="cpu", out=str(tmp_path), overrides=words
    )
    sweep(options, Silent())
    found = [record for _, record in read_folder(tmp_path)]
    assert [record.status for record in found] == ["ok", "ok"]
    assert all(0.1 <= record.seconds < 30 for record in found)
