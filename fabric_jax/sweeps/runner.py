"""Runs the cells of an experiment that have no record yet."""

import os
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol

from fabric_jax.errors import FabricError
from fabric_jax.files import write_json
from fabric_jax.sweeps.cells import cell_to_json, describe, distinguishing, select
from fabric_jax.sweeps.child import Job, draft_record
from fabric_jax.sweeps.environment import (
    SharedDevices,
    chosen_variables,
    device_variables,
    process_environment,
    recorded_variables,
)
from fabric_jax.sweeps.experiment import Experiment, check_platform, load_experiment
from fabric_jax.sweeps.identity import LENGTH, cell_digest, code_digest
from fabric_jax.sweeps.process import Ending, run_process
from fabric_jax.sweeps.records import Record, read_record, write_record

Rerun = Literal["none", "failed", "stale", "all"]
State = Literal["waiting", "running", "done", "kept", "stale"]
SHARE_OF_MEMORY = 0.9
NAME_LENGTH = 80


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """One call of ``fabric-jax sweep``.

    Attributes:
        experiment: dotted name of its module.
        platform: what the cells are for.
        out: folder of the records.
        overrides: ``key=value`` words.
        jobs: cells at a time, on each device where some are named.
        devices: GPUs to use at once, as CUDA_VISIBLE_DEVICES names them; each cell sees one. Empty:
            cells are not told.
        rerun: which cells with a record run again.
        timeout: seconds a cell; 0 for the experiment's own.
        memory_gib: resident set at which a cell is killed; 0 for nine tenths of the machine's.
        cache: folder for compiled programs that cells share; "" for none.
        limit: the most cells to run now; 0 for all.
    """

    experiment: str
    platform: str
    out: str
    overrides: tuple[str, ...] = ()
    jobs: int = 1
    devices: tuple[str, ...] = ()
    rerun: Rerun = "none"
    timeout: float = 0.0
    memory_gib: float = 0.0
    cache: str = ""
    limit: int = 0

    @property
    def at_once(self) -> int:
        """Cells at a time in all."""
        return self.jobs * max(len(self.devices), 1)


@dataclass(kw_only=True)
class Task:
    """A cell with its record, once there is one."""

    cell: Any
    draft: Record
    path: Path
    state: State = "waiting"
    record: Record | None = None
    started: float = 0.0


class Board(Protocol):
    """Shows how a sweep goes; :mod:`fabric_jax.sweeps.board` has those for people."""

    def begin(self, tasks: Sequence[Task], jobs: int) -> None:
        """The sweep starts."""
        ...

    def update(self, task: Task) -> None:
        """A task has another state."""
        ...

    def end(self) -> None:
        """The sweep is over, or was stopped."""
        ...


def plan(options: SweepOptions) -> tuple[Experiment, list[Task]]:
    """The tasks of a sweep, with the records that are there already.

    Raises:
        FabricError: something in the options or the experiment is wrong, or a record is damaged.
    """
    check_platform(options.platform)
    if options.jobs < 1:
        raise FabricError("jobs out of range", expected="1 or more", found=str(options.jobs))
    _check_devices(options)
    experiment = load_experiment(options.experiment)
    cells = select(experiment.config(), experiment.cells, options.overrides)
    code = code_digest(experiment.module)
    everything = experiment.cells(experiment.config())
    differing = set(distinguishing([*everything, *cells]))
    tasks = [_task(experiment, options, cell, differing, code) for cell in cells]
    _find_records(options, tasks)
    return experiment, tasks


def _find_records(options: SweepOptions, tasks: Sequence[Task]) -> None:
    """Gives the tasks what is there of them."""
    folder = tasks[0].path.parent
    # A file's name may have been another one beside other cells, but for the digest at its end.
    there = {path.stem[-LENGTH:]: path for path in folder.glob(f"{options.platform}-*.json")}
    for task in tasks:
        task.path = there.get(task.draft.digest, task.path)
        task.state, task.record = "waiting", None
        if task.path.exists():
            task.record = read_record(task.path)
            task.state = "stale" if task.record.code != task.draft.code else "kept"
            if _runs_again(task, options.rerun):
                task.state, task.record = "waiting", None


def sweep(options: SweepOptions, board: Board) -> list[Task]:
    """Runs what has no record; every cell has one at the end.

    Raises:
        FabricError: the options are wrong, or another sweep uses the folder.
        KeyboardInterrupt: Ctrl-C; running cells were killed and will run again.
    """
    from fabric_jax.training.lock import locked_folder

    experiment, tasks = plan(options)
    folder = Path(options.out) / experiment.name
    with locked_folder(folder):
        # Another sweep may have ended since.
        _find_records(options, tasks)
        write_json(folder / ".sweep", {"command": command_line(options)})
        waiting = [task for task in tasks if task.state == "waiting"]
        waiting = waiting[: options.limit or None]
        stop = threading.Event()
        board.begin(tasks, options.at_once)
        try:
            _run_all(experiment, options, waiting, board, stop)
        finally:
            board.end()
    return tasks


def _check_devices(options: SweepOptions) -> None:
    if options.devices and options.platform != "cuda":
        raise FabricError(
            "cells are given devices of their own on cuda alone",
            found=f"--devices with --platform {options.platform}",
            fix="Leave out --devices; --jobs says how many cells run at a time",
        )
    if len(set(options.devices)) != len(options.devices) or not all(options.devices):
        raise FabricError(
            "each device is named once", expected="as in 0,1,2", found=",".join(options.devices)
        )


def command_line(options: SweepOptions, overrides: str | None = None) -> str:
    """The command of a sweep, without paths of this machine; ``overrides`` instead of its own."""
    words = ["fabric-jax sweep", options.experiment, "--platform", options.platform, "--out DIR"]
    if options.cache:
        words.append("--cache CACHE")
    given = " ".join(options.overrides) if overrides is None else overrides
    return " ".join([*words, given]).strip()


def _run_all(
    experiment: Experiment,
    options: SweepOptions,
    tasks: list[Task],
    board: Board,
    stop: threading.Event,
) -> None:
    devices = SharedDevices(options.jobs, options.devices or ("",))

    def one(task: Task) -> None:
        chosen = _variables(experiment, options, task)
        with devices.share(chosen) as device:
            if stop.is_set():
                return
            chosen = device_variables(device) | chosen
            task.state, task.started = "running", time.monotonic()
            board.update(task)
            _run_task(experiment, options, task, chosen, stop)
            board.update(task)

    with ThreadPoolExecutor(options.at_once) as pool:
        futures = [pool.submit(one, task) for task in tasks]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise


def _variables(experiment: Experiment, options: SweepOptions, task: Task) -> dict[str, str]:
    own = experiment.environment(task.cell, options.platform) if experiment.environment else {}
    return chosen_variables(options.platform, own, _absolute(options.cache), options.jobs)


def _run_task(
    experiment: Experiment,
    options: SweepOptions,
    task: Task,
    chosen: dict[str, str],
    stop: threading.Event,
) -> None:
    draft = replace(
        task.draft,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        environment=recorded_variables(chosen),
    )

    # Of each device one cell at a time is timed.
    turn = task.path.absolute().parent / f".turn{chosen.get('CUDA_VISIBLE_DEVICES', '')}"
    # A record that is to be replaced stays until there is a new one.
    old = _version(task.path)

    def written() -> bool:
        return _version(task.path) not in (None, old)

    def run(prepare: bool) -> Ending:
        return run_process(
            Job(
                path=str(task.path.absolute()),
                record=draft.to_json(),
                module=experiment.module,
                parent=os.getpid(),
                prepare=prepare,
            ),
            process_environment(chosen, str(turn)),
            timeout=options.timeout or experiment.timeout,
            memory_bytes=_memory_limit(options),
            stop=stop,
            written=written,
        )

    ending = run(prepare=True) if experiment.prepare else None
    if ending is None or ending.status == "ok":
        ending = run(prepare=False)
    if ending.status == "stopped":
        task.state = "waiting"
        return
    if not written():
        write_record(task.path, _failed(draft, ending))
    task.record, task.state = read_record(task.path), "done"


def _failed(draft: Record, ending: Ending) -> Record:
    """The record of a process that left none."""
    gone = ending.status == "ok"
    return replace(
        draft,
        status="crash" if gone else ending.status,
        detail="the process ended before measure() did" if gone else ending.detail,
        seconds=round(ending.seconds, 3),
        device=_host_facts(),
    )


def _task(
    experiment: Experiment,
    options: SweepOptions,
    cell: Any,
    differing: set[str],
    code: str,
) -> Task:
    values = cell_to_json(cell)
    default = cell_to_json(experiment.config())
    changed = {key for key in values if values[key] != default[key]}
    told = [k for k in values if k in changed or k in differing]
    name = describe(values, told) or "base"
    digest = cell_digest(experiment.name, options.platform, values)
    # Names of files have a limit in bytes.
    known = (c if c.isascii() and (c.isalnum() or c in ".-+") else "_" for c in name)
    slug = "".join(known)[:NAME_LENGTH]
    draft = draft_record(
        experiment=experiment.name,
        question=experiment.question,
        name=name,
        platform=options.platform,
        cell=values,
        digest=digest,
        code=code,
        command=command_line(options, "" if name == "base" else name),
        started="",
        environment={},
        figure=None if experiment.figure is None else experiment.figure.to_json(),
        columns=list(experiment.columns),
    )
    path = Path(options.out) / experiment.name / f"{options.platform}-{slug}-{digest}.json"
    return Task(cell=cell, draft=draft, path=path)


def _runs_again(task: Task, rerun: Rerun) -> bool:
    if task.record is None or rerun == "none":
        return False
    failed = task.record.status not in ("ok", "unsupported")
    return rerun == "all" or (failed if rerun == "failed" else task.state == "stale")


def _version(path: Path) -> tuple[int, int] | None:
    """Tells a file from one that replaces it; None where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _memory_limit(options: SweepOptions) -> int:
    if options.memory_gib:
        return int(options.memory_gib * 2**30)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(SHARE_OF_MEMORY * total / options.at_once)


def _host_facts() -> dict[str, Any]:
    """Of the machine of a process that can't say it any more."""
    import platform

    return {
        "platform": "host",
        "kind": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "executable": Path(sys.executable).name,
    }


def _absolute(folder: str) -> str:
    return str(Path(folder).absolute()) if folder else ""
