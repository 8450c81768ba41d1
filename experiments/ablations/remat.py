"""What does recomputing in the backward pass save, and what does it cost?

The first, second and last give the same gradients; int8-residuals rounds what it keeps.

    fabric-jax sweep experiments.ablations.remat --out DIR

After ``make quickstart``; 8 cells of half a minute on two cores.
"""

from typing import Any

from experiments.finetune_run import QUALITY, RunConfig
from experiments.finetune_run import environment as environment
from experiments.finetune_run import measure as measure_run
from fabric_jax.sweeps import Figure, grid

COLUMNS = QUALITY
FIGURE = Figure(x="remat", y="compiled_temporary_bytes", kind="bar")


def config() -> RunConfig:
    return RunConfig()


def cells(base: RunConfig) -> list[RunConfig]:
    return grid(base, remat=("none", "linears", "int8-residuals", "layer"), seed=(0, 1))


def measure(cell: RunConfig) -> dict[str, Any]:
    return measure_run(cell)
