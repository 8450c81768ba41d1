"""Do 8-bit moments and a 16-bit adapter train like float32 ones?

Moments as int8 blocks (2.03 bytes a parameter), adapter weights as bfloat16 with stochastic
rounding.

    fabric-jax sweep experiments.ablations.optimizer_width --out DIR

After ``make quickstart``; 12 cells of half a minute on two cores.
"""

from typing import Any

from experiments.finetune_run import QUALITY, RunConfig
from experiments.finetune_run import environment as environment
from experiments.finetune_run import measure as measure_run
from fabric_jax.sweeps import Figure, grid

COLUMNS = QUALITY
FIGURE = Figure(x="moments", y="accuracy", series="adapter_dtype", kind="bar")


def config() -> RunConfig:
    return RunConfig()


def cells(base: RunConfig) -> list[RunConfig]:
    return grid(
        base, moments=("float32", "int8"), adapter_dtype=("float32", "bfloat16"), seed=(0, 1, 2)
    )


def measure(cell: RunConfig) -> dict[str, Any]:
    return measure_run(cell)
