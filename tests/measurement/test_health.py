import json
from pathlib import Path

import jax
import pytest
from fabric_kernels import cpu_library, select_implementation

from fabric_jax.measurement import health
from fabric_jax.measurement.health import check_folder, check_health
from fabric_jax.measurement.requirements import MissingPart, Part


def test_this_machine_is_exact_and_can_train(tmp_path: Path):
    found = check_health(tmp_path)
    assert [device.self_test for device in found.devices] == ["exact"] * len(jax.local_devices())
    assert {device.implementation for device in found.devices} == {select_implementation()}
    assert found.cpu_kernels == cpu_library.status()
    assert found.can_train
    assert json.loads(json.dumps(found.to_dict()))["can_train"] is True


def test_wrong_integers_stop_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(health, "self_test", lambda: "cpu: 1 of 9 values differ")
    assert not check_health(tmp_path).can_train


def test_without_cpu_kernels_it_trains_on_xla(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("FABRIC_KERNELS_CPU", "0")
    found = check_health(tmp_path)
    assert found.cpu_kernels.library is None
    assert "FABRIC_KERNELS_CPU=0" in found.cpu_kernels.problem
    assert {device.implementation for device in found.devices} == {"xla"}
    assert found.environment["FABRIC_KERNELS_CPU"] == "0"
    assert found.can_train


def test_a_device_that_fails_is_reported_not_raised(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def broken() -> str:
        raise RuntimeError("no driver")

    monkeypatch.setattr(health, "self_test", broken)
    found = check_health(tmp_path)
    assert found.devices[0].self_test == "failed: RuntimeError: no driver"
    assert not found.can_train


@pytest.mark.parametrize("required", [True, False])
def test_only_required_parts_stop_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, required: bool
):
    part = Part(name="x", purpose="y", required=required)
    missing = [MissingPart(part=part, command="z")]
    monkeypatch.setattr(health, "missing_parts", lambda platforms: missing)
    assert check_health(tmp_path).can_train is not required


def test_a_folder_that_takes_no_files_is_named_with_the_reason(tmp_path: Path):
    assert check_folder(tmp_path).problem == ""
    assert check_folder(tmp_path).free_bytes > 0
    # Not even root can create files there.
    assert check_folder(Path("/proc")).problem != ""
    assert not list(tmp_path.iterdir())


def test_variables_that_steer_jax_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    assert check_health(tmp_path).environment["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
