"""Whether this machine can train: devices, self-tests, kernels, missing parts, the folder."""

import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from fabric_kernels import cpu_library, select_implementation
from fabric_kernels.cpu_library import CpuLibraryStatus

from fabric_jax.measurement.device import DeviceFacts, device_facts, device_memory_bytes
from fabric_jax.measurement.requirements import MissingPart, missing_parts
from fabric_jax.measurement.self_test import EXACT, self_test

# What these hold decides which devices jax uses, how it allocates, and which kernels run.
ENVIRONMENT = (
    "JAX_PLATFORMS",
    "CUDA_VISIBLE_DEVICES",
    "XLA_FLAGS",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "FABRIC_KERNELS_CPU",
    "FABRIC_KERNELS_ISA",
    "FABRIC_KERNELS_CACHE",
    "FABRIC_KERNELS_CXXFLAGS",
)


@dataclass(frozen=True, kw_only=True)
class DeviceHealth:
    """One device.

    Attributes:
        index: of jax's local devices.
        platform: cpu, gpu or tpu.
        kind: the device's own name.
        memory_bytes: what its allocator may hand out; the host's memory for a CPU.
        implementation: of ``ternary_matmul`` on it.
        self_test: ``exact``, or what went wrong.
    """

    index: int
    platform: str
    kind: str
    memory_bytes: int
    implementation: str
    self_test: str


@dataclass(frozen=True, kw_only=True)
class FolderHealth:
    """A folder to write into.

    Attributes:
        path: where.
        problem: why nothing can be written, empty where it can.
        free_bytes: on its file system.
    """

    path: str
    problem: str
    free_bytes: int


@dataclass(frozen=True, kw_only=True)
class Health:
    """All of it.

    Attributes:
        facts: of the machine.
        devices: those of jax.
        cpu_kernels: the compiled library, or why there is none.
        missing: parts that aren't installed.
        folder: the current one.
        environment: variables that are set and change what is run.
    """

    facts: DeviceFacts
    devices: tuple[DeviceHealth, ...]
    cpu_kernels: CpuLibraryStatus
    missing: tuple[MissingPart, ...]
    folder: FolderHealth
    environment: dict[str, str]

    @property
    def can_train(self) -> bool:
        """Every required part is there, and the default device's integers are right."""
        lacks = any(missing.part.required for missing in self.missing)
        return not lacks and self.devices[0].self_test == EXACT

    def to_dict(self) -> dict[str, Any]:
        """Field to value, as JSON can hold them."""
        return {**asdict(self), "can_train": self.can_train}


def check_health(folder: Path) -> Health:
    """Looks at everything; takes a few seconds, most of it the self-test's compilation.

    Where the CPU kernels have never been compiled, that is done first.
    """
    cpu_kernels = cpu_library.status()
    devices = tuple(_check_device(index) for index in range(len(jax.local_devices())))
    return Health(
        facts=device_facts(),
        devices=devices,
        cpu_kernels=cpu_kernels,
        missing=tuple(missing_parts({device.platform for device in devices})),
        folder=check_folder(folder),
        environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    )


def check_folder(folder: Path) -> FolderHealth:
    """Tries to write into ``folder``."""
    problem = ""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        problem = error.strerror or str(error)
    return FolderHealth(
        path=str(folder), problem=problem, free_bytes=shutil.disk_usage(folder).free
    )


def _check_device(index: int) -> DeviceHealth:
    device = jax.local_devices()[index]
    with jax.default_device(device):
        try:
            outcome = self_test()
        # A broken driver or plugin can fail in any way; the report is where that is said.
        except Exception as error:
            outcome = f"failed: {type(error).__name__}: {error}"
        implementation = select_implementation()
    return DeviceHealth(
        index=index,
        platform=device.platform,
        kind=device.device_kind,
        memory_bytes=device_memory_bytes(device),
        implementation=implementation,
        self_test=outcome,
    )
