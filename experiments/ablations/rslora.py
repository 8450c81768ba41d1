"""Does a scale of alpha over the root of the rank help where the rank is large?

Kalajdzievski 2023, arXiv:2312.03732; alpha is 16 at every rank, as there.

    fabric-jax sweep experiments.ablations.rslora --out DIR

After ``make quickstart``; 18 cells of half a minute on two cores.
"""

from typing import Any

from experiments.finetune_run import QUALITY, RunConfig
from experiments.finetune_run import environment as environment
from experiments.finetune_run import measure as measure_run
from fabric_jax.sweeps import Figure, grid

COLUMNS = QUALITY
FIGURE = Figure(x="rank", y="accuracy", series="rslora", log="x")


def config() -> RunConfig:
    return RunConfig()


def cells(base: RunConfig) -> list[RunConfig]:
    return grid(base, rslora=(False, True), rank=(8, 32, 128), alpha=(16.0,), seed=(0, 1, 2))


def measure(cell: RunConfig) -> dict[str, Any]:
    return measure_run(cell)
