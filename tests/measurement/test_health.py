import json
from pathlib import Path

import jax
import pytest
from fabric_kernels import ternary_matmul

from fabric_jax.measurement import health
from fabric_jax.measurement.health import check_folder, check_health, self_test
from fabric_jax.measurement.requirements import MissingPart, Part


def test_this_machine_is_exact_and_can_train(tmp_path: Path):
    found = check_health(tmp_path)
    assert [device.self_test for device in found.devices] == ["exact"] * len(jax.local_devices())
    assert {device.implementation for device in found.devices} == {"xla"}
    assert found.can_train
    assert json.loads(json.dumps(found.to_dict()))["can_train"] is True


def test_one_wrong_integer_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def wrong(x: jax.Array, packed: jax.Array) -> jax.Array:
        return ternary_matmul(x, packed).at[2, 3].add(1)

    monkeypatch.setattr(health, "ternary_matmul", wrong)
    assert self_test() == "1 of 895 values differ"
    assert not check_health(tmp_path).can_train


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
