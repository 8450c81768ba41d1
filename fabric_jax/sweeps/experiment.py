"""What an experiment's module has, and how it is found."""

import inspect
import os
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from fabric_jax.errors import FabricError, unknown_name

PLATFORM_VARIABLE = "FABRIC_SWEEP_PLATFORM"
JOBS_VARIABLE = "FABRIC_SWEEP_JOBS"
TURN_VARIABLE = "FABRIC_SWEEP_TURN"
PLATFORMS = {
    "cpu": "run",
    "cuda": "run",
    "tpu-v5e": "compiled",
    "tpu-v5p": "compiled",
    "tpu-v6e": "compiled",
    "tpu-7x": "compiled",
    "rocm": "lowered",
    "metal": "lowered",
    "oneapi": "lowered",
}
"""Each with the most that is done there: run; compile without the hardware; lower to the compiler's
input."""

KINDS_OF_FIGURE = ("line", "bar", "stack")
OF_REPORTS = (
    *("vram", "finetune_throughput", "decode_throughput", "host_decode", "lossless", "biomed"),
    *("memory", "speed", "rank"),
)
"""What ``experiments`` alone may be called; the last three are figures."""


class NotOnThisPlatform(Exception):
    """A cell that can't be had on the platform; raised by ``measure``, and a result."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """How an experiment's records are drawn.

    Attributes:
        x: setting or metric on the horizontal axis.
        y: metric on the vertical one; the mean of cells that differ in nothing else than what is
            not named here, such as seeds, with its 95 % interval.
        series: setting that gives each line; "" for one line.
        log: axes that are logarithmic: "", "x", "y" or "xy".
        kind: ``line``, or ``bar`` where x is a name; ``stack`` for bars of a metric ``y`` that is
            itself a table of category to number.
        baseline: value of x that the others are compared with, seed by seed; the figure and a table
            are then of differences to it. "" for none.
    """

    x: str
    y: str
    series: str = ""
    log: str = ""
    kind: str = "line"
    baseline: str = ""

    def __post_init__(self) -> None:
        """Refuses what can't be drawn."""
        for name, allowed in (("kind", KINDS_OF_FIGURE), ("log", ("", "x", "y", "xy"))):
            if getattr(self, name) not in allowed:
                raise unknown_name(f"{name} of a figure", str(getattr(self, name)), allowed)

    def to_json(self) -> dict[str, str]:
        """Field to value."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment's module, checked.

    Attributes:
        module: its dotted name.
        name: the last part of it.
        question: the first paragraph of its docstring.
        config: gives the base cell.
        cells: gives all cells from a base cell.
        measure: a cell's metrics; runs in a process of its own.
        prepare: runs in a process of its own before that, or None: what is to be on disk, such as
            compiled programs, but not in the process that is measured.
        environment: variables of the cell's process, from cell and platform.
        timeout: seconds that a cell may take.
        figure: how the records are drawn, or None.
        columns: metrics that tables show; empty for all.
    """

    module: str
    name: str
    question: str
    config: Callable[[], Any]
    cells: Callable[[Any], Sequence[Any]]
    measure: Callable[[Any], dict[str, Any]]
    prepare: Callable[[Any], None] | None
    environment: Callable[[Any, str], dict[str, str]] | None
    timeout: float
    figure: Figure | None
    columns: tuple[str, ...]


def current_platform() -> str:
    """The platform that a cell's process is for, a key of ``PLATFORMS``; cpu outside of sweeps."""
    return os.environ.get(PLATFORM_VARIABLE, "cpu")


def runs_alone() -> bool:
    """Whether no other cell runs beside this one, as times and a driver's counts need."""
    return os.environ.get(JOBS_VARIABLE, "1") == "1"


@contextmanager
def own_turn() -> Generator[None]:
    """Around what is timed: of the cells that run beside one another one at a time is in it.

    The others start, trace and load compiled programs meanwhile, which takes processor cores but
    not the device.
    """
    path = os.environ.get(TURN_VARIABLE, "")
    if not path:
        yield
        return
    import fcntl

    with open(path, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def load_experiment(name: str) -> Experiment:
    """Imports ``name`` (``experiments.vram``), the working directory's modules among others.

    Raises:
        FabricError: no such module, or it lacks something.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    missing = FabricError(
        f"no experiment {name!r}",
        expected="the dotted name of a module, such as experiments.vram",
        fix="Run from the folder that holds the experiment",
    )
    if not name or name.startswith("."):
        raise missing
    try:
        module = import_module(name)
    except ModuleNotFoundError as error:
        # A module that the experiment imports may be the one that isn't there.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise missing from error
    return _checked(module)


def _checked(module: ModuleType) -> Experiment:
    name = module.__name__
    for wanted in ("config", "cells", "measure"):
        if not callable(getattr(module, wanted, None)):
            raise FabricError(f"experiment {name} has no function {wanted}")
    document = inspect.getdoc(module)
    if not document:
        raise FabricError(f"experiment {name} has no docstring", expected="its question")
    if name in OF_REPORTS:
        raise FabricError(
            f"experiment {name} has a name that reports use for tables or figures of their own",
            fix="Rename the module",
        )
    base = module.config()
    if not is_dataclass(base) or not type(base).__dataclass_params__.frozen:  # pyright: ignore
        raise FabricError(
            f"config() of experiment {name}",
            expected="a frozen dataclass",
            found=type(base).__name__,
        )
    figure = getattr(module, "FIGURE", None)
    if figure is not None:
        _check_figure(name, figure, base)
    return Experiment(
        module=name,
        name=name.removeprefix("experiments."),
        question=" ".join(document.split("\n\n")[0].split()),
        config=module.config,
        cells=module.cells,
        measure=module.measure,
        prepare=getattr(module, "prepare", None),
        environment=getattr(module, "environment", None),
        timeout=float(getattr(module, "TIMEOUT_SECONDS", 3600)),
        figure=figure,
        columns=tuple(getattr(module, "COLUMNS", ())),
    )


def _check_figure(experiment: str, figure: Any, base: Any) -> None:
    if not isinstance(figure, Figure):
        raise FabricError(
            f"FIGURE of experiment {experiment}",
            expected="a fabric_jax.sweeps.Figure",
            found=type(figure).__name__,
        )
    names = [field.name for field in fields(base)]
    if figure.series and figure.series not in names:
        raise unknown_name(f"series in FIGURE of experiment {experiment}", figure.series, names)
    if "x" in figure.log and isinstance(getattr(base, figure.x, None), str | bool | tuple):
        raise FabricError(
            f"FIGURE of experiment {experiment}: {figure.x} is no number, so log can't name x"
        )


def check_platform(platform: str) -> str:
    """``platform`` if it is one.

    Raises:
        FabricError: it isn't.
    """
    if platform not in PLATFORMS:
        raise unknown_name("platform", platform, PLATFORMS)
    return platform
