import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from fabric_jax.measurement import device
from fabric_jax.measurement.device import device_facts

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
TWO_CORES = """\
processor\t: 0
model name\t: Some Processor @ 2 GHz
flags\t\t: fpu avx2 fma avx512f avx512_vnni

processor\t: 1
model name\t: Some Processor @ 2 GHz
flags\t\t: fpu avx2 fma
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n"


def test_facts_survive_json():
    facts = device_facts()
    again = json.loads(json.dumps(facts.to_dict()))
    assert again["platform"] == "cpu"
    assert again["packages"]["jax"] == version("jax")
    assert set(again["packages"]) == set(device.PACKAGES)


def test_packages_that_are_not_installed_are_left_out():
    assert device.package_versions(("jax", "no-such-package")) == {"jax": version("jax")}


@linux
def test_cores_and_memory_are_what_the_system_says():
    assert device.usable_cores() == int(subprocess.check_output(["nproc"]))
    found = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    assert 0 < device.host_memory_bytes() <= int(found.group(1)) * 1024


@linux
def test_a_lower_limit_of_the_container_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    unlimited, limit = tmp_path / "memory.max", tmp_path / "limit_in_bytes"
    unlimited.write_text("max\n")
    limit.write_text("123456\n")
    monkeypatch.setattr(device, "CGROUP_LIMITS", (unlimited, limit, tmp_path / "none"))
    assert device.host_memory_bytes() == 123456


@linux
@pytest.mark.parametrize(
    ("cpuinfo", "features", "name"),
    [
        (TWO_CORES, ("avx2", "fma"), "Some Processor @ 2 GHz"),
        (ARM, ("asimd", "asimddp", "i8mm"), os.uname().machine),
        ("", (), os.uname().machine),
    ],
    ids=["cores-that-differ", "arm", "no-cpuinfo"],
)
def test_features_are_those_of_every_core(
    monkeypatch: pytest.MonkeyPatch, cpuinfo: str, features: tuple[str, ...], name: str
):
    monkeypatch.setattr(device, "_cpuinfo", lambda: cpuinfo)
    assert device.cpu_features() == features
    assert device.cpu_name() == name
