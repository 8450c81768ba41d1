"""What this machine can do at most, measured by loops of the CPU library without XLA."""

import ctypes
import os
import re
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from fabric_kernels import cpu_library
from fabric_kernels.large_pages import in_large_pages

PIECE_BYTES = 1 << 20
"""The least that a thread reads."""

# How memory is read fastest differs between machines: as one stream or four, prefetched or not.
_READING = [(streams, ahead) for streams in (1, 4) for ahead in (0, 2048)]


def pool_threads() -> int:
    """Threads that XLA's pool has in this process: NPROC, else the processors we may run on."""
    named = os.environ.get("NPROC", "")
    if named.isdecimal() and int(named) > 0:
        return int(named)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def largest_cache_bytes() -> int | None:
    """Of the processor's last cache, where the system tells."""
    sizes: list[int] = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        told = re.fullmatch(r"(\d+)([KM]?)\s*", path.read_text(encoding="utf-8"))
        if told is not None:
            sizes.append(int(told[1]) << {"": 0, "K": 10, "M": 20}[told[2]])
    return max(sizes, default=None)


@dataclass(frozen=True)
class Peaks:
    """Measures the peaks again and again; single figures of a busy machine say little.

    Attributes:
        threads: that take part.
        buffer: uint8, what is read; larger than every cache.
        streams: how reading is fastest here.
        ahead: bytes prefetched.
    """

    threads: int
    buffer: np.ndarray
    streams: int
    ahead: int

    def dot_operations(self, seconds: float) -> float:
        """8-bit multiplications and additions a second of the dot-product instruction alone."""
        ask = _function("FabricPeakDot", ctypes.c_int, ctypes.c_double)
        return _checked(ask(self.threads, seconds))

    def read_bytes(self, seconds: float) -> float:
        """Bytes a second that arrive from memory in registers."""
        return _read(self.buffer, self.threads, seconds, self.streams, self.ahead)


def make_peaks(threads: int, buffer_bytes: int, seconds: float) -> Peaks:
    """Allocates what is read and finds out how; takes about ten times ``seconds``.

    Raises:
        ValueError: the buffer has no piece for each thread.
        CpuLibraryError: there is no library.
    """
    if threads < 1 or buffer_bytes < threads * PIECE_BYTES:
        raise ValueError(
            f"{threads} threads read at least {PIECE_BYTES} bytes each, found {buffer_bytes}"
        )
    buffer = np.asarray(in_large_pages(jnp.full(buffer_bytes, 1, jnp.uint8)))
    rates: dict[tuple[int, int], float] = dict.fromkeys(_READING, 0.0)
    for _ in range(2):
        for way in _READING:
            rates[way] = max(rates[way], _read(buffer, threads, seconds, *way))
    streams, ahead = max(rates, key=lambda way: rates[way])
    return Peaks(threads, buffer, streams, ahead)


def _read(buffer: np.ndarray, threads: int, seconds: float, streams: int, ahead: int) -> float:
    ask = _function(
        "FabricPeakRead",
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_double,
        ctypes.c_int,
        ctypes.c_int64,
    )
    return _checked(ask(buffer.ctypes.data, buffer.nbytes, threads, seconds, streams, ahead))


def _function(name: str, *arguments: type) -> "ctypes._NamedFuncPointer":  # pyright: ignore[reportPrivateUsage]
    function = ctypes.CDLL(cpu_library.load().path)[name]
    function.argtypes = arguments
    function.restype = ctypes.c_double
    return function


def _checked(rate: float) -> float:
    assert rate > 0, "the arguments were checked, and the library's kernels run"
    return rate
