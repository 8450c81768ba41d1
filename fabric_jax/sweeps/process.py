"""Starts a cell's process and watches it: time, memory, how it ended."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fabric_jax.sweeps.child import Job, out_of_memory, shortened

INTERVAL_SECONDS = 0.05
# For a process to end by itself once its record is there; threads may keep it for ever.
GRACE_SECONDS = 10.0
TAIL = 1500
MIB = 1 << 20
# The second is there in a container alone, which may not see the first.
OOM_COUNTERS = ("/proc/vmstat", "/sys/fs/cgroup/memory.events")


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a process ended.

    Attributes:
        status: ``ok`` for exit code 0, a record's status otherwise, ``stopped`` by us.
        detail: what is to be said of it.
        seconds: from start to end.
    """

    status: str
    detail: str | None
    seconds: float


def run_process(
    job: Job,
    environment: dict[str, str],
    *,
    timeout: float,
    memory_bytes: int,
    stop: threading.Event,
    written: Callable[[], bool],
) -> Ending:
    """Runs a job's process to its end, which may be ours.

    Args:
        job: what it is told.
        environment: all of its variables.
        timeout: seconds after which it is killed.
        memory_bytes: resident set at which it is killed.
        stop: once set, it is killed.
        written: whether the record is there, after which it has to end soon.
    """
    start = time.monotonic()
    kills = oom_kills()
    with tempfile.TemporaryDirectory(prefix="fabric-sweep-") as folder:
        told = Path(folder) / "job.json"
        told.write_text(job.to_json())
        with (Path(folder) / "output").open("w+b") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "fabric_jax.sweeps.child", str(told)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                reason = _watch(process, start + timeout, memory_bytes, stop, written)
            finally:
                _kill(process)
            seconds = time.monotonic() - start
            if reason is not None:
                status, detail = reason
                return Ending(status=status, detail=detail, seconds=seconds)
            said = _tail(Path(output.name))
    return _judge(process.returncode, said, seconds, oom_killed=oom_kills() > kills)


def _watch(
    process: "subprocess.Popen[bytes]",
    deadline: float,
    memory_bytes: int,
    stop: threading.Event,
    written: Callable[[], bool],
) -> tuple[str, str | None] | None:
    """Waits for the end; (status, detail) where it has to be brought about."""
    done = False
    while process.poll() is None:
        if not done and written():
            done, deadline = True, min(deadline, time.monotonic() + GRACE_SECONDS)
        if stop.wait(INTERVAL_SECONDS):
            return "stopped", None
        if time.monotonic() > deadline:
            return "timeout", "killed after its time was over"
        resident = resident_bytes(process.pid)
        if resident > memory_bytes:
            limit = f"the limit was {memory_bytes // MIB} MiB"
            return "out_of_memory", f"killed at {resident // MIB} MiB resident; {limit}"
    return None


def _judge(code: int, said: str, seconds: float, *, oom_killed: bool) -> Ending:
    if code == 0:
        return Ending(status="ok", detail=None, seconds=seconds)
    name = f"exit code {code}"
    if code < 0:
        name = f"killed by {signal.Signals(-code).name}"
    if code == -signal.SIGKILL and oom_killed:
        return Ending(
            status="out_of_memory", detail="killed by the system for memory", seconds=seconds
        )
    status = "out_of_memory" if out_of_memory(said) else "crash"
    last = said.strip().splitlines()[-3:]
    return Ending(status=status, detail=shortened("; ".join([name, *last])), seconds=seconds)


def resident_bytes(process: int) -> int:
    """Resident set of another process; 0 where it can't be read or has ended."""
    try:
        pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def oom_kills() -> int:
    """Processes that the system has killed for memory so far, on this machine or in a container."""
    lines: list[str] = []
    for counters in OOM_COUNTERS:
        with contextlib.suppress(OSError):
            lines += Path(counters).read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Ends the process and whatever it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        return file.read().decode(errors="replace")
