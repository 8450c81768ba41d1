"""Variables of a cell's process; they must be there before jax is imported."""

import os
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from fabric_jax.sweeps.experiment import JOBS_VARIABLE, PLATFORM_VARIABLE, TURN_VARIABLE

# What jax is told on each platform. Where nothing runs, programs are made by a process on the CPU.
BACKENDS = {"cpu": "cpu", "cuda": "cuda,cpu"}
# A process has its context and its programs besides its pool.
CONTEXT = 0.015
WHOLE_DEVICE = 0.95
# What a shell may have set for something else and would change what is measured.
UNSET = (
    *("XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION"),
    *("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_ALLOCATOR", "TF_GPU_ALLOCATOR"),
    *("JAX_PLATFORMS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION"),
)
# What jax, XLA and the kernels read of the other variables of a shell: left as it is, and recorded.
READ = ("JAX_", "XLA_", "FABRIC_KERNELS_", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE", "NPROC")
PATHS = ("JAX_COMPILATION_CACHE_DIR", "FABRIC_KERNELS_CACHE")


def chosen_variables(
    platform: str, own: dict[str, str], cache: str, jobs: int = 1
) -> dict[str, str]:
    """What is set for a cell and recorded with it.

    Args:
        platform: of the cell.
        own: what the experiment asks for; it goes first.
        cache: folder for compiled programs that cells share; "" for none.
        jobs: cells at a time on a device, in this sweep; ``FABRIC_SWEEP_JOBS`` in our own
            environment says how many there are in all sweeps that were started together.
    """
    chosen = {"JAX_PLATFORMS": BACKENDS.get(platform, "cpu"), PLATFORM_VARIABLE: platform}
    jobs = max(jobs, int(os.environ.get(JOBS_VARIABLE, "1")))
    if jobs > 1:
        chosen[JOBS_VARIABLE] = str(jobs)
    if platform == "cuda":
        # With a pool of its own the allocator counts what was asked for; without, it hands out
        # (and counts) blocks of up to twice the size.
        chosen["XLA_PYTHON_CLIENT_PREALLOCATE"] = "true"
    if platform not in BACKENDS:
        # The CPU's own kernels would otherwise be picked for programs that are not for it.
        chosen["FABRIC_KERNELS_CPU"] = "0"
    if cache:
        chosen["JAX_COMPILATION_CACHE_DIR"] = cache
        chosen["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return chosen | own


def device_variables(device: str) -> dict[str, str]:
    """What a cell is told that has one of several devices; the driver's numbers hold for it."""
    if not device:
        return {}
    return {"CUDA_VISIBLE_DEVICES": device, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


class SharedDevices:
    """Lets cells run beside one another as far as their shares of a device's memory allow.

    Args:
        jobs: cells at a time on each device; with one there is nothing to share.
        devices: their names; one without a name where no cell is told which it has.
    """

    def __init__(self, jobs: int, devices: Sequence[str] = ("",)) -> None:
        """Every device is free."""
        self._jobs = jobs
        self._places = dict.fromkeys(devices, jobs)
        self._free = dict.fromkeys(devices, WHOLE_DEVICE)
        self._changed = threading.Condition()

    @contextmanager
    def share(self, chosen: dict[str, str]) -> Generator[str]:
        """Waits for the share that a cell's variables claim; a pool without one is everything.

        Yields the name of the device that has it, the one with the fewest cells.
        """
        wanted = 0.0
        if self._jobs > 1 and chosen.get("XLA_PYTHON_CLIENT_PREALLOCATE") == "true":
            fraction = float(chosen.get("XLA_PYTHON_CLIENT_MEM_FRACTION", WHOLE_DEVICE))
            wanted = min(fraction + CONTEXT, WHOLE_DEVICE)
        with self._changed:
            device = self._changed.wait_for(lambda: self._with_room(wanted))[0]
            self._places[device] -= 1
            self._free[device] -= wanted
        try:
            yield device
        finally:
            with self._changed:
                self._places[device] += 1
                self._free[device] += wanted
                self._changed.notify_all()

    def _with_room(self, wanted: float) -> list[str]:
        """Devices that can take a cell, the one with the most places first."""
        # Shares are sums of hundredths.
        able = [
            n for n, places in self._places.items() if places and self._free[n] >= wanted - 1e-6
        ]
        return sorted(able, key=lambda name: -self._places[name])


def process_environment(chosen: dict[str, str], turn: str = "") -> dict[str, str]:
    """The whole environment of a cell's process; ``turn`` is the file that ``own_turn`` locks."""
    kept = {key: value for key, value in os.environ.items() if key not in UNSET}
    paths = [path for path in sys.path if path]
    return kept | {"PYTHONPATH": os.pathsep.join(paths), TURN_VARIABLE: turn} | chosen


def recorded_variables(chosen: dict[str, str]) -> dict[str, str]:
    """``chosen``, and what a shell has set besides; paths of this machine are only said to be."""
    kept = {k: v for k, v in os.environ.items() if k.startswith(READ) and k not in UNSET}
    return {
        key: "set" if key in PATHS or value.startswith("/") else value
        for key, value in (kept | chosen).items()
    }
