import stat
from pathlib import Path

import jax
import pytest

from fabric_jax.measurement import driver


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def smi(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of that name, first on the path."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_without_a_gpu_there_is_no_figure():
    if jax.default_backend() == "gpu":
        pytest.skip("a GPU is here")
    assert driver.driver_bytes() is None
    with driver.DriverPeak() as sampled:
        pass
    assert sampled.peak is None


@pytest.mark.usefixtures("on_gpu")
def test_mebibytes_become_bytes_and_the_largest_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "used"

    def use(mebibytes: int) -> None:
        """In one go: a sample may be taken at any moment."""
        part = tmp_path / "part"
        part.write_text(f"{mebibytes}\n")
        part.replace(file)

    use(700)
    smi(tmp_path, f"cat {file}", monkeypatch)
    assert driver.driver_bytes() == 700 << 20
    monkeypatch.setattr(driver, "INTERVAL_SECONDS", 0.001)
    with driver.DriverPeak() as sampled:
        use(1234)
    use(5)
    assert sampled.peak == 1234 << 20


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("body", ["echo '[N/A]'", "exit 9", "echo 12; exit 1"])
def test_no_answer_is_no_figure(body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    smi(tmp_path, body, monkeypatch)
    assert driver.driver_bytes() is None
