"""Facts about the machine, for records and for ``fabric-jax doctor``."""

import os
import platform
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from fabric_jax.measurement.memory import Device, allocator_stats

PACKAGES = ("fabric-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# Instruction sets that decide how fast small-integer products run, by Linux's names for them.
CPU_FEATURES = (
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "amx_int8"),
    *("asimd", "asimddp", "i8mm", "sve"),
)
CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """Where a result was made.

    Attributes:
        platform: of jax's default backend: cpu, gpu, tpu.
        kind: the device's own name.
        count: local devices.
        memory_bytes: of one device; on CPU what the machine lets this process have.
        cpu: the processor's name.
        cores: those this process may run on.
        cpu_features: instruction sets among ``CPU_FEATURES``.
        host_memory_bytes: main memory, or the container's limit where that is lower.
        system: operating system and machine.
        python: its version.
        packages: installed versions by name.
    """

    platform: str
    kind: str
    count: int
    memory_bytes: int
    cpu: str
    cores: int
    cpu_features: tuple[str, ...]
    host_memory_bytes: int
    system: str
    python: str
    packages: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Field to value, as JSON can hold them."""
        return asdict(self)


def device_facts() -> DeviceFacts:
    """The facts of this process's first local device and its machine."""
    devices = jax.local_devices()
    return DeviceFacts(
        platform=devices[0].platform,
        kind=devices[0].device_kind,
        count=len(devices),
        memory_bytes=device_memory_bytes(devices[0]),
        cpu=cpu_name(),
        cores=usable_cores(),
        cpu_features=cpu_features(),
        host_memory_bytes=host_memory_bytes(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        packages=package_versions(PACKAGES),
    )


def device_memory_bytes(device: Device) -> int:
    """What the allocator of a device may hand out; the host's memory for a CPU."""
    stats = allocator_stats(device)
    if stats is None or "bytes_limit" not in stats:
        return host_memory_bytes()
    return stats["bytes_limit"]


def package_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Installed version by name; packages that aren't installed are left out."""
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def usable_cores() -> int:
    """Cores that the scheduler may give this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def host_memory_bytes() -> int:
    """Main memory in bytes, or the container's limit where that is lower."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([total, *_cgroup_limits()])


def cpu_name() -> str:
    """The processor's name for people, or the architecture where it can't be found."""
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def cpu_features() -> tuple[str, ...]:
    """The instruction sets among ``CPU_FEATURES`` that every core of this machine has."""
    if sys.platform == "darwin":
        return _darwin_features()
    lines = re.findall(r"^(?:flags|Features)\s*:\s*(.*)$", _cpuinfo(), re.MULTILINE)
    if not lines:
        return ()
    common = set.intersection(*(set(line.split()) for line in lines))
    return tuple(name for name in CPU_FEATURES if name in common)


def _cgroup_limits() -> list[int]:
    limits: list[int] = []
    for path in CGROUP_LIMITS:
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            limits.append(int(text))
    return limits


def _darwin_features() -> tuple[str, ...]:
    names = {
        "hw.optional.avx2_0": "avx2",
        "hw.optional.neon": "asimd",
        "hw.optional.arm.FEAT_DotProd": "asimddp",
        "hw.optional.arm.FEAT_I8MM": "i8mm",
    }
    return tuple(name for key, name in names.items() if _sysctl(key) == "1")


def _sysctl(key: str) -> str:
    answer = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, check=False)
    return answer.stdout.strip()


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
