"""The biomedical set in reports: the epoch with compiling apart, accuracy with intervals."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fabric_jax.report.build import write_report
from fabric_jax.report.claims import all_verdicts
from fabric_jax.report.records_index import Index
from fabric_jax.sweeps.records import Record, read_folder

Folder = Callable[..., Path]
Make = Callable[..., Record]


@pytest.fixture
def epoch(make_record: Make) -> Make:
    """An epoch of the smallest model: seconds, seconds to compile, rows a step."""

    def make(seconds: float, compiling: float, rows: int = 1, **more: Any) -> Record:
        cell = {"model": "bitnet-125m", "shape": "custom", "rows": rows, "length": 128}
        cell |= {"packing": True}
        metrics = {
            "epoch_seconds": seconds,
            "compile_seconds": compiling,
            "step_seconds": seconds / 10,
            "roofline_seconds": seconds / 20,
            "of_roofline": 0.5,
            "epoch_steps": 10,
            "steps_run": more.pop("steps_run", 10),
            "positions": 1280,
            "peak_bytes": 1 << 30,
            "loss_first": 10.0,
            "loss_last": 9.0,
            "trainable_tokens_per_second": 1.0,
            "positions_per_second": 2.0,
        }
        return make_record("finetune_throughput", more.pop("platform", "cuda"), cell, metrics)

    return make


def test_the_fastest_epoch_of_each_platform_is_said_warm(folder: Folder, epoch: Make) -> None:
    path = folder(epoch(3.0, 20.0), epoch(1.25, 30.0, rows=8), epoch(45.5, 4.0, platform="cpu"))
    write_report(path, path)
    text = (path / "report.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("Published: 80 s"))
    assert "On cuda (A GPU) the fastest takes 1.25 s" in line
    assert "making the program 30.00 s" in line
    assert "On cpu" in line
    assert "45.50 s once its program is there" in line
    assert "8 × 128 packed" in text


@pytest.mark.parametrize(("compiling", "verdict"), [(500.0, "holds under"), (600.0, "does not")])
def test_ten_minutes_include_compiling(
    folder: Folder, epoch: Make, compiling: float, verdict: str
) -> None:
    index = Index(tuple(read_folder(folder(epoch(10.0, compiling)))))
    (found,) = (v for v in all_verdicts(index) if "ten minutes" in v.claim)
    assert found.verdict.startswith(verdict)


def test_an_epoch_that_was_scaled_says_so(folder: Folder, epoch: Make) -> None:
    path = folder(epoch(10.0, 1.0, steps_run=6))
    write_report(path, path)
    assert "(6 steps of it ran)" in (path / "report.md").read_text()


def test_accuracy_by_rank_has_intervals_over_seeds(folder: Folder, make_record: Make) -> None:
    records = [
        make_record(
            "biomed",
            "cuda",
            {"rank": 8, "targets": ["all"], "seed": seed, "model": "a model"},
            {"accuracy": accuracy, "questions": 120, "eval_loss": 0.5, "trained_parameters": 7},
        )
        for seed, accuracy in enumerate((0.7, 0.8, 0.9))
    ]
    # Of an earlier protocol: not one of the seeds.
    cell, metrics = records[0].cell | {"steps": 10}, records[0].metrics | {"accuracy": 0.1}
    earlier = make_record("biomed", "cuda", cell, metrics, started="2025-01-01T00:00:00+00:00")
    path = folder(*records, earlier)
    write_report(path, path)
    text = (path / "report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| cuda | all | 8 |"))
    half = 4.303 * 10 / math.sqrt(3)
    assert f"80.0 ± {half:.1f}" in row
    assert "| 72.7 |" in row
    assert "70.0 – 90.0" in row
