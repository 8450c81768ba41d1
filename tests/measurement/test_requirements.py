import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fabric_jax.measurement import requirements
from fabric_jax.measurement.requirements import (
    PARTS,
    extra_command,
    install_command,
    missing_parts,
    present_accelerators,
)


def requirement_of(command: str) -> Requirement:
    prefix = "python -m pip install '"
    assert command.startswith(prefix)
    return Requirement(command.removeprefix(prefix).removesuffix("'"))


@pytest.mark.parametrize("part", [part for part in PARTS if part.required], ids=lambda p: p.name)
def test_command_installs_a_version_that_this_package_accepts(part: requirements.Part):
    requirement = requirement_of(install_command(part.name))
    assert requirement.specifier.contains(version(part.name), prereleases=True)
    assert str(requirement.specifier)


def test_command_follows_the_python_version():
    wanted = ">=0.12.10" if sys.version_info >= (3, 12) else ">=0.12.8"
    assert str(requirement_of(install_command("flax")).specifier) == wanted


@pytest.mark.parametrize(
    ("extra", "name", "plugin"),
    [("cuda", "jax", "cuda13"), ("rocm", "jax", "rocm7-local"), ("tpu", "jax", "tpu")],
)
def test_extras_name_the_plugin(extra: str, name: str, plugin: str):
    command = extra_command(extra)
    assert f"'{name}[{plugin}]" in command


def test_a_package_that_is_gone_is_reported(monkeypatch: pytest.MonkeyPatch):
    def without_grain(name: str) -> str:
        if name == "grain":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(requirements, "version", without_grain)
    lacking = {missing.part.name: missing for missing in missing_parts({"cpu"})}
    assert lacking["grain"].part.required
    assert lacking["grain"].command.startswith("python -m pip install 'grain>=")
    assert "flax" not in lacking


def pci_device(root: Path, slot: str, vendor: str, kind: str) -> None:
    folder = root / "sys/bus/pci/devices" / slot
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(f"{vendor}\n")
    (folder / "class").write_text(f"{kind}\n")


def test_accelerators_show_by_their_devices(tmp_path: Path):
    assert present_accelerators(tmp_path) == []
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    (tmp_path / "dev/kfd").touch()
    pci_device(tmp_path, "0000:00:04.0", "0x1ae0", "0x088000")
    assert present_accelerators(tmp_path) == ["cuda", "rocm", "tpu"]


def test_googles_disks_and_network_cards_are_no_tpu(tmp_path: Path):
    pci_device(tmp_path, "0000:00:05.0", "0x1ae0", "0x010802")
    pci_device(tmp_path, "0000:00:06.0", "0x1ae0", "0x020000")
    pci_device(tmp_path, "0000:00:07.0", "0x8086", "0x088000")
    assert present_accelerators(tmp_path) == []


@pytest.mark.parametrize(("platforms", "missing"), [({"cpu"}, True), ({"cpu", "gpu"}, False)])
def test_a_gpu_that_jax_does_not_see_misses_its_plugin(
    monkeypatch: pytest.MonkeyPatch, platforms: set[str], missing: bool
):
    monkeypatch.setattr(requirements, "present_accelerators", lambda: ["cuda"])
    names = {part.part.name for part in missing_parts(platforms)}
    assert ("cuda" in names) is missing
