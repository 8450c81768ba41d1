import resource
import sys
from pathlib import Path

import numpy as np
import pytest

from fabric_jax.measurement import memory

MEBIBYTE = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_touched_memory_shows_in_the_present_figure_and_in_the_peak():
    before = memory.current_memory_bytes()
    block = np.ones(64 * MEBIBYTE, np.uint8)
    during = memory.current_memory_bytes()
    assert 60 * MEBIBYTE < during - before < 80 * MEBIBYTE
    del block
    assert memory.peak_memory_bytes() >= during - 4 * MEBIBYTE


@linux
def test_peak_is_what_the_operating_system_accounts():
    memory.current_memory_bytes()
    ours = memory.resident_peak_bytes()
    theirs = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert ours <= theirs + 4 * MEBIBYTE


@linux
def test_reset_forgets_an_earlier_peak():
    block = np.ones(128 * MEBIBYTE, np.uint8)
    high = memory.peak_memory_bytes()
    del block
    if not memory.reset_peak_memory():
        pytest.skip("this kernel does not let a process reset its peak")
    assert memory.peak_memory_bytes() < high - 100 * MEBIBYTE


def test_reset_says_when_it_cannot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "none" / "clear_refs")
    assert memory.reset_peak_memory() is False


def test_without_proc_the_figures_agree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with_proc = memory.resident_bytes()
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    assert memory.resident_bytes() == pytest.approx(with_proc, rel=0.1)
    assert memory.resident_peak_bytes() >= with_proc - 4 * MEBIBYTE


class Accelerator:
    """A device whose allocator keeps counters, as GPUs and TPUs do."""

    platform = "gpu"

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_in_use": 5, "peak_bytes_in_use": 7, "bytes_limit": 11}


def test_an_allocator_with_counters_is_asked_instead_of_the_process():
    assert memory.peak_memory_bytes(Accelerator()) == 7
    assert memory.current_memory_bytes(Accelerator()) == 5
