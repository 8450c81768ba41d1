"""Do 1.6 bits a weight give the same adapter as 2 bits, and at what speed?

Losses must agree to the last digit.

    fabric-jax sweep experiments.ablations.packing --out DIR

After ``make quickstart``; 4 cells of half a minute on two cores.
"""

from typing import Any

from experiments.finetune_run import QUALITY, RunConfig
from experiments.finetune_run import environment as environment
from experiments.finetune_run import measure as measure_run
from fabric_jax.sweeps import Figure, grid

COLUMNS = QUALITY
FIGURE = Figure(x="weights", y="step_seconds", kind="bar")


def config() -> RunConfig:
    return RunConfig()


def cells(base: RunConfig) -> list[RunConfig]:
    return grid(base, weights=("ternary2", "ternary1.6"), seed=(0, 1))


def measure(cell: RunConfig) -> dict[str, Any]:
    return measure_run(cell)
