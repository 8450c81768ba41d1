"""How does accuracy on yes/no/uncertain questions depend on LoRA's rank and targets?

Ranks 4 to 128 on all linears, and the two halves of the targets at rank 8, three seeds each.

    make quickstart
    fabric-jax sweep experiments.biomed --platform cpu --out DIR
    fabric-jax sweep experiments.biomed --platform cuda --out DIR model=FOLDER data=train.jsonl \
        eval_data=test.jsonl length=128

The first is about the quickstart's invented drugs and its small model: 30 cells of half a minute on
two cores. The second is the published protocol, with real questions and a real model (a folder, a
.gguf file or a hub id). Published for comparison: Qwen3-1.7B, 33 test questions, 69.70 to 75.76 %.
"""

from dataclasses import replace
from typing import Any

from experiments.finetune_run import QUALITY, RunConfig
from experiments.finetune_run import environment as environment
from experiments.finetune_run import measure as measure_run
from fabric_jax.sweeps import Figure, grid

COLUMNS = ("accuracy", "accuracy_low", "accuracy_high", *QUALITY[1:])
FIGURE = Figure(x="rank", y="accuracy", series="targets", log="x")
SEEDS = (0, 1, 2)


def config() -> RunConfig:
    # As published for rank 8. With alpha in proportion to the rank, ranks of 64 and more would need
    # a lower learning rate.
    return RunConfig(alpha=16.0)


def cells(base: RunConfig) -> list[RunConfig]:
    ranks = grid(base, rank=(4, 8, 16, 24, 32, 40, 64, 128), seed=SEEDS)
    halves = grid(replace(base, rank=8), targets=(("attention",), ("mlp",)), seed=SEEDS)
    return [*ranks, *halves]


def measure(cell: RunConfig) -> dict[str, Any]:
    return measure_run(cell)
