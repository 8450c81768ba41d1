"""Jobs are killed at random moments, a disk is full, checkpoints are damaged: nothing is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.faults import FINDINGS, KINDS, OF_ONE, SHARES, least_tried, read

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.xdist_group("training processes")
def test_fifty_kills_lose_no_work_and_harm_no_output(tmp_path: Path) -> None:
    """In two sessions, of which the second adds to the record of the first."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    output = tmp_path / "record.json"
    for _ in range(2):
        # Several processes that train together are killed in tests/training/test_processes.py.
        command = [sys.executable, "-m", "experiments.faults", "--output", str(output)]
        command += ["--kinds", *OF_ONE]
        result = subprocess.run(
            [*command, "--tries", "36", "--seconds", "600", "--scratch", str(tmp_path)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=1500,
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    record = json.loads(output.read_text())
    assert record["problems"] == []
    assert record["kills"] >= 40
    assert len(record["sessions"]) == 2
    for kind in OF_ONE:
        assert record["kinds"][kind]["tries"] > 0
        assert all(record["kinds"][kind][finding] == 0 for finding in FINDINGS)
    for kind in ("training", "checkpointing"):
        assert record["kinds"][kind]["resumed"] > 0
        assert record["kinds"][kind]["runs_compared"] >= 2
    assert record["kinds"]["damaged_checkpoint"]["noticed"] > 0


def test_kinds_are_tried_by_their_shares(tmp_path: Path) -> None:
    record: dict[str, Any] = read(tmp_path / "none.json")
    for _ in range(sum(SHARES.values())):
        record["kinds"][least_tried(record, KINDS)]["tries"] += 1
    assert {kind: record["kinds"][kind]["tries"] for kind in KINDS} == SHARES


def test_the_record_kept_has_no_finding() -> None:
    record = json.loads((ROOT / "experiments/results/faults-cpu.json").read_text())
    assert record["problems"] == []
    kinds = record["kinds"]
    assert record["kills"] == sum(kinds[kind].get("kills", 0) for kind in KINDS)
    assert all(kinds[kind][finding] == 0 for kind in KINDS for finding in FINDINGS)
