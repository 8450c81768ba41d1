"""A sweep as people see it: a live table in a terminal, a line a cell elsewhere."""

import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fabric_jax.sweeps.records import Record
from fabric_jax.sweeps.runner import Board, Task

SHOWN = 18


def make_board() -> Board:
    """For this process's standard error."""
    return LiveBoard() if sys.stderr.isatty() else LineBoard()


class LineBoard:
    """Prints a line when a cell is done."""

    def begin(self, tasks: Sequence[Task], jobs: int) -> None:
        """Says how many cells there are."""
        self._tasks, self._jobs = tasks, jobs
        print(f"{_heading(tasks, jobs)}", file=sys.stderr, flush=True)

    def update(self, task: Task) -> None:
        """One line, once there is a record."""
        if task.state == "done" and task.record is not None:
            record = task.record
            text = f"{record.status:13} {record.seconds:8.1f} s  {record.name}  {headline(record)}"
            print(f"{text}  [{_left(self._tasks, self._jobs)}]", file=sys.stderr, flush=True)

    def end(self) -> None:
        """The counts."""
        print(_heading(self._tasks, self._jobs), file=sys.stderr, flush=True)


class LiveBoard:
    """A table that is redrawn: what is running, what came last, what is next, time left."""

    def begin(self, tasks: Sequence[Task], jobs: int) -> None:
        """Starts drawing."""
        from rich.live import Live

        self._tasks, self._jobs = tasks, jobs
        self._live = Live(get_renderable=self._draw, refresh_per_second=2)
        self._live.start()

    def update(self, task: Task) -> None:
        """Nothing to do: the table is redrawn anyway."""

    def end(self) -> None:
        """Leaves the last table where it is."""
        self._live.stop()

    def _draw(self) -> Any:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, title=_heading(self._tasks, self._jobs))
        for name in ("cell", "state", "seconds", "result"):
            table.add_column(name, justify="right" if name == "seconds" else "left")
        for task in _visible(self._tasks):
            seconds = "" if task.record is None else f"{task.record.seconds:.1f}"
            if task.state == "running":
                seconds = f"{time.monotonic() - task.started:.0f}"
            state = task.state if task.record is None else f"{task.state}: {task.record.status}"
            result = "" if task.record is None else headline(task.record)
            table.add_row(Text(task.draft.name), state, seconds, Text(result))
        return table


def headline(record: Record) -> str:
    """The first metrics that are plain numbers, or what is to be said of a failure."""
    if record.status != "ok":
        return (record.detail or "")[:90]
    names = record.columns or list(record.metrics)
    shown = [
        f"{name} {_short(record.metrics[name])}"
        for name in names
        if isinstance(record.metrics.get(name), int | float)
    ]
    return ", ".join(shown[:3])


def _short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _visible(tasks: Sequence[Task]) -> list[Task]:
    """The tasks around those that are running."""
    if len(tasks) <= SHOWN:
        return list(tasks)
    running = [i for i, task in enumerate(tasks) if task.state == "running"]
    middle = running[0] if running else len(tasks) - 1
    first = max(0, min(middle - SHOWN // 2, len(tasks) - SHOWN))
    return list(tasks[first : first + SHOWN])


def _heading(tasks: Sequence[Task], jobs: int) -> str:
    states = Counter(
        task.state if task.record is None or task.state == "stale" else task.record.status
        for task in tasks
    )
    counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in states.items())
    text = (
        f"{tasks[0].draft.experiment} on {tasks[0].draft.platform}: {len(tasks)} cells ({counts})"
    )
    if states["stale"]:
        text += "; STALE records were made by other code: --rerun stale makes them again"
    return f"{text}, {_left(tasks, jobs)}" if states["waiting"] or states["running"] else text


def _left(tasks: Sequence[Task], jobs: int) -> str:
    """Time left, from the median of what was run."""
    spent = [t.record.seconds for t in tasks if t.state == "done" and t.record is not None]
    remaining = sum(task.state in ("waiting", "running") for task in tasks)
    if not remaining:
        return "done"
    if not spent:
        return f"{remaining} left"
    seconds = statistics.median(spent) * remaining / jobs
    return (
        f"{remaining} left, about {seconds / 60:.0f} min"
        if seconds > 90
        else (f"{remaining} left, about {seconds:.0f} s")
    )
