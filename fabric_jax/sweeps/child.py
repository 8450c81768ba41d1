"""The process of one cell: measures, and writes the record itself.

``python -m fabric_jax.sweeps.child JOB`` with the JSON of a :class:`Job`. What the parent can see
and this process can't (a signal, a time-out, too much memory) the parent records.
"""

import ctypes
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fabric_jax.sweeps.cells import cell_from_json
from fabric_jax.sweeps.experiment import PLATFORMS, NotOnThisPlatform, load_experiment
from fabric_jax.sweeps.records import KINDS, Record, record_from_json, write_record

PACKAGES = ("fabric-jax", "jax", "jaxlib", "flax", "optax", "numpy", "libtpu")
OUT_OF_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED|CUDA_ERROR_OUT_OF_MEMORY|bad_alloc|MemoryError|[Oo]ut of memory"
)
SET_PARENT_DEATH_SIGNAL = 1


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a cell's process is told.

    Attributes:
        path: of the record.
        record: as far as it is known before.
        module: of the experiment.
        parent: process that started this one.
        prepare: run the experiment's ``prepare`` instead, and write nothing.
    """

    path: str
    record: dict[str, Any]
    module: str
    parent: int
    prepare: bool = False

    def to_json(self) -> str:
        """As the command line of the process has it."""
        return json.dumps(asdict(self))


def main() -> int:
    """Runs the job named on the command line; 0 once a record is written."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    _die_with(job.parent)
    experiment = load_experiment(job.module)
    draft = record_from_json(job.record, "the job")
    cell = cell_from_json(type(experiment.config()), draft.cell)
    if job.prepare:
        if experiment.prepare is not None:
            experiment.prepare(cell)
        return 0
    start = time.perf_counter()
    try:
        record = _measured(draft, experiment.measure(cell))
    except NotOnThisPlatform as reason:
        record = replace(draft, status="unsupported", detail=shortened(str(reason)))
    except Exception as error:
        # Also what XLA raises: its errors have no class of their own for lack of memory.
        traceback.print_exc()
        status = "out_of_memory" if out_of_memory(error) else "crash"
        record = replace(draft, status=status, detail=_short(error))
    seconds = round(time.perf_counter() - start, 3)
    write_record(Path(job.path), replace(record, seconds=seconds, device=facts()))
    return 0


def _measured(draft: Record, given: Any) -> Record:
    """The record with what ``measure`` gave.

    Raises:
        TypeError, ValueError, FabricError: that is nothing a record can hold.
    """
    if not isinstance(given, dict):
        raise TypeError(f"measure() gave a {type(given).__name__} instead of a dict of metrics")
    metrics = json.loads(json.dumps(given, default=_as_json))
    record = replace(draft, kind=metrics.pop("kind", draft.kind), metrics=metrics)
    if record.kind not in KINDS:
        raise ValueError(f"measure() gave the kind {record.kind!r}; there are {KINDS}")
    return record_from_json(record.to_json(), "measure()")


def out_of_memory(error: BaseException | str) -> bool:
    """Whether an error, or what a process printed last, speaks of memory that wasn't to be had."""
    if isinstance(error, MemoryError):
        return True
    return OUT_OF_MEMORY.search(str(error)) is not None


def draft_record(
    *, experiment: str, question: str, name: str, platform: str, cell: dict[str, Any], **rest: Any
) -> Record:
    """A record before its cell has run."""
    return Record(
        experiment=experiment,
        question=question,
        name=name,
        platform=platform,
        kind=PLATFORMS[platform],
        status="ok",
        cell=cell,
        metrics={},
        detail=None,
        seconds=0.0,
        device={},
        **rest,
    )


def facts() -> dict[str, Any]:
    """Of the machine, and of the device where this process has used one."""
    from importlib.metadata import PackageNotFoundError, version

    packages: dict[str, str] = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    found: dict[str, Any] = {"python": platform.python_version()}
    try:
        found |= _jax_facts()
    except RuntimeError as error:
        # A device that has failed may not answer any more; the failure is what is recorded.
        found |= {"platform": "host", "kind": platform.machine(), "problem": str(error)[:200]}
    return found | {"packages": packages}


def _jax_facts() -> dict[str, Any]:
    if "jax" not in sys.modules:
        return {"platform": "host", "kind": platform.machine(), "system": platform.system()}
    from fabric_jax.measurement.device import device_facts

    found = device_facts().to_dict()
    if found["platform"] == "gpu":
        found["driver"] = _driver_version()
    return found


def _driver_version() -> str | None:
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return answer.stdout.strip() or None


def _die_with(parent: int) -> None:
    """A killed sweep leaves no cell running. Linux only; elsewhere such a cell ends by itself."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(1)


def _as_json(value: Any) -> Any:
    """Numbers of numpy and jax."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"measure() gave a {type(value).__name__}, which JSON can't hold")


def _short(error: BaseException) -> str:
    return shortened(f"{type(error).__name__}: {error}")


def shortened(text: str) -> str:
    """At most 600 characters, without folders of this machine."""
    text = re.sub(r"(?:/[\w.+-]+)+/(?=[\w.+-]+\.\w)", "", text.strip())
    return text if len(text) <= 600 else f"{text[:580]} [shortened]"


if __name__ == "__main__":
    sys.exit(main())
