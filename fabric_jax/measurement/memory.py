"""How much memory a process uses, and its high-water mark."""

import ctypes
import gc
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol, cast

import jax

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


class Device(Protocol):
    """What is asked of a ``jax.Device`` here."""

    @property
    def platform(self) -> str:
        """cpu, gpu or tpu."""
        ...

    def memory_stats(self) -> Any:
        """Counters of the allocator, None where it keeps none."""
        ...


def peak_memory_bytes(device: Device | None = None) -> int:
    """The most memory in use at once, in bytes, since the process began or the last reset.

    On an accelerator what its allocator handed out (``peak_bytes_in_use``, without the driver's
    own share); on CPU the resident set of the whole process.

    Args:
        device: the first local device where not given.
    """
    stats = allocator_stats(device)
    return resident_peak_bytes() if stats is None else stats["peak_bytes_in_use"]


def current_memory_bytes(device: Device | None = None) -> int:
    """Memory in use now, in bytes; counted as in :func:`peak_memory_bytes`."""
    stats = allocator_stats(device)
    return resident_bytes() if stats is None else stats["bytes_in_use"]


def reset_peak_memory() -> bool:
    """Lowers the recorded peak of the process to its present resident set.

    Returns:
        Whether the peak is that of this moment now. Only Linux can do it, and only for the host;
        the peak of an accelerator's allocator lasts as long as its process.
    """
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def release_free_memory() -> bool:
    """Gives memory that the process no longer uses back to the system.

    Compiling and loading leave hundreds of MiB of freed blocks in the C library's heap, which it
    keeps for later; a long run is better off without them.

    Returns:
        Whether there was a way: only glibc has one.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return False
    gc.collect()
    trim(0)
    return True


def allocator_stats(device: Device | None = None) -> dict[str, int] | None:
    """Counters of the device's allocator, None where it keeps none (CPU)."""
    chosen = jax.local_devices()[0] if device is None else device
    stats = cast(dict[str, int] | None, chosen.memory_stats())
    if chosen.platform == "cpu" or not stats or "peak_bytes_in_use" not in stats:
        return None
    return stats


def resident_bytes() -> int:
    """Resident set of this process, bytes."""
    if STATUS.exists():
        return _status_bytes("VmRSS")
    listed = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True
    )
    return int(listed.stdout) * 1024


def resident_peak_bytes() -> int:
    """Largest resident set of this process so far, bytes."""
    if STATUS.exists():
        return _status_bytes("VmHWM")
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def _status_bytes(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{STATUS} has no line {key}")
    return int(found.group(1)) * 1024
