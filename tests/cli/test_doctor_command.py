import json
from pathlib import Path

import jax
import pytest
from fabric_kernels import cpu_library
from fabric_kernels.cpu_library import CpuLibraryStatus

from fabric_jax.measurement import health
from fabric_jax.measurement.requirements import ACCELERATORS, MissingPart


def test_json_tells_devices_versions_and_folder(
    fabric, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    outcome = fabric("doctor", "--json")
    assert outcome.code == 0
    found = json.loads(outcome.out)
    assert found["can_train"] is True
    assert [device["self_test"] for device in found["devices"]] == ["exact"] * len(jax.devices())
    assert found["folder"]["path"] == str(tmp_path)
    assert found["facts"]["packages"]["jax"] == jax.__version__


def test_tables_say_what_was_found(fabric):
    outcome = fabric("doctor")
    assert outcome.code == 0
    for word in ("ternary_matmul", "exact", "jaxlib", "writable", "This machine can train."):
        assert word in outcome.out


def test_exit_code_1_when_integers_are_wrong(fabric, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(health, "self_test", lambda: "3 of 895 values differ")
    outcome = fabric("doctor")
    assert outcome.code == 1
    assert "3 of 895 values differ" in outcome.out
    assert "cannot train" in outcome.out


def test_a_missing_part_comes_with_its_command(fabric, monkeypatch: pytest.MonkeyPatch):
    part = MissingPart(part=ACCELERATORS["cuda"], command="python -m pip x")
    monkeypatch.setattr(health, "missing_parts", lambda platforms: [part])
    outcome = fabric("doctor")
    assert outcome.code == 0
    assert "the NVIDIA GPU of this machine" in outcome.out
    assert "python -m pip x" in outcome.out


def test_the_cpu_kernels_are_shown(fabric):
    found = cpu_library.status()
    # Long lines are folded.
    said = " ".join(fabric("doctor").out.split())
    if found.library is None:
        assert found.problem in said
        assert found.fix in said
    else:
        assert found.library.isa in said
        assert found.library.compiler in said


def test_without_cpu_kernels_reason_and_remedy_are_shown(fabric, monkeypatch: pytest.MonkeyPatch):
    missing = CpuLibraryStatus(library=None, problem="there is no compiler", fix="Install one")
    monkeypatch.setattr(cpu_library, "status", lambda: missing)
    outcome = fabric("doctor")
    assert outcome.code == 0
    assert "products run on XLA: there is no compiler. Install one." in outcome.out
    found = json.loads(fabric("doctor", "--json").out)
    assert found["cpu_kernels"] == {
        "library": None,
        "problem": "there is no compiler",
        "fix": "Install one",
    }
    assert {device["implementation"] for device in found["devices"]} == {"xla"}
