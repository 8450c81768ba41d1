"""Is it better to spend adapter weights on rank or on more linears?

Each target set at three ranks.

    fabric-jax sweep experiments.ablations.rank_and_targets --out DIR

After ``make quickstart``; 36 cells of half a minute on two cores.
"""

from typing import Any

from experiments.finetune_run import QUALITY, RunConfig
from experiments.finetune_run import environment as environment
from experiments.finetune_run import measure as measure_run
from fabric_jax.sweeps import Figure, grid

COLUMNS = QUALITY
FIGURE = Figure(x="trained_parameters", y="accuracy", series="targets", log="x")


def config() -> RunConfig:
    return RunConfig()


def cells(base: RunConfig) -> list[RunConfig]:
    return grid(
        base,
        targets=(("all",), ("attention",), ("mlp",), ("q", "v")),
        rank=(4, 16, 64),
        seed=(0, 1, 2),
    )


def measure(cell: RunConfig) -> dict[str, Any]:
    return measure_run(cell)
