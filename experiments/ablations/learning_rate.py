"""Which learning rate does LoRA on a ternary base want?

Factors of about three around the default.

    fabric-jax sweep experiments.ablations.learning_rate --out DIR

After ``make quickstart``; 15 cells of half a minute on two cores.
"""

from typing import Any

from experiments.finetune_run import QUALITY, RunConfig
from experiments.finetune_run import environment as environment
from experiments.finetune_run import measure as measure_run
from fabric_jax.sweeps import Figure, grid

COLUMNS = QUALITY
FIGURE = Figure(x="learning_rate", y="accuracy", log="x")


def config() -> RunConfig:
    return RunConfig()


def cells(base: RunConfig) -> list[RunConfig]:
    return grid(base, learning_rate=(2e-4, 6e-4, 2e-3, 6e-3, 2e-2), seed=(0, 1, 2))


def measure(cell: RunConfig) -> dict[str, Any]:
    return measure_run(cell)
