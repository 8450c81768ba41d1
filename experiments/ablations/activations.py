"""Does the quantiser of activations matter to what is learnt?

Per token is BitNet's; blocks of 256 are what llama.cpp's CPU path does; none is what its GPU paths
do. The model was trained with the first, and is fine-tuned and asked with each.

    fabric-jax sweep experiments.ablations.activations --out DIR

After ``make quickstart``; 9 cells of half a minute on two cores.
"""

from typing import Any

from experiments.finetune_run import QUALITY, RunConfig
from experiments.finetune_run import environment as environment
from experiments.finetune_run import measure as measure_run
from fabric_jax.sweeps import Figure, grid

COLUMNS = QUALITY
FIGURE = Figure(x="act_quant", y="accuracy", kind="bar")


def config() -> RunConfig:
    return RunConfig()


def cells(base: RunConfig) -> list[RunConfig]:
    return grid(base, act_quant=("per_token", "block256", "none"), seed=(0, 1, 2))


def measure(cell: RunConfig) -> dict[str, Any]:
    return measure_run(cell)
