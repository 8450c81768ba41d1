"""Does the format of embedding and head change what is learnt?

The table is frozen; it is rounded once, when the model is loaded.

    fabric-jax sweep experiments.ablations.head_format --out DIR

After ``make quickstart``; 12 cells of half a minute on two cores.
"""

from typing import Any

from experiments.finetune_run import QUALITY, RunConfig
from experiments.finetune_run import environment as environment
from experiments.finetune_run import measure as measure_run
from fabric_jax.sweeps import Figure, grid

COLUMNS = QUALITY
FIGURE = Figure(x="embedding_dtype", y="accuracy", kind="bar")


def config() -> RunConfig:
    return RunConfig()


def cells(base: RunConfig) -> list[RunConfig]:
    return grid(base, embedding_dtype=("same", "float16", "int8", "int4"), seed=(0, 1, 2))


def measure(cell: RunConfig) -> dict[str, Any]:
    return measure_run(cell)
