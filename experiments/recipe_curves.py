"""Do the recipes that take the least memory train like the others?

Recipes A (2 bits, float16 embedding, float32 moments), B (1.6 bits) and C (1.6 bits, int8
embedding, 8-bit moments) fine-tune the same model on the same rows. A and B must agree bit for bit;
C is compared with how far apart runs of A from other seeds are.

    python -m experiments.recipe_curves --data train.jsonl --tokenizer vocab.gguf --out out.json

Seven runs of 200 steps: about ten minutes on two cores at the default size.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from fabric_jax.data.config import DataConfig
from fabric_jax.files import require_writable, write_json
from fabric_jax.measurement.device import device_facts
from fabric_jax.training.config import FinetuneConfig, OptimizerConfig
from fabric_jax.training.loop import finetune

Recipe = Literal["A", "B", "C"]
RUNS: tuple[tuple[Recipe, int], ...] = (
    *(("A", 0), ("A", 1), ("A", 2)),
    *(("B", 0), ("C", 0), ("C", 1), ("C", 2)),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all runs share.

    Attributes:
        data: rows to train on.
        tokenizer: as ``load_tokenizer`` takes it.
        model: registry name.
        steps: optimizer steps of a run.
        length: positions in a row.
    """

    data: str
    tokenizer: str
    model: str = "bitnet-125m"
    steps: int = 200
    length: int = 128


def config(settings: Settings, output: str) -> FinetuneConfig:
    """Recipe A with seed 0."""
    return FinetuneConfig(
        model=settings.model,
        output=output,
        dataset=DataConfig(
            data=settings.data, tokenizer=settings.tokenizer, max_length=settings.length
        ),
        optimizer=OptimizerConfig(clip_norm=0.0),
        weights="ternary2",
        embedding_dtype="float16",
        remat="layer",
        fused_update=True,
        epochs=1000,
        max_steps=settings.steps,
        save_every=0,
        tensorboard=False,
    )


def cells(base: FinetuneConfig) -> dict[str, FinetuneConfig]:
    """Each run under its name, recipe and seed."""
    found: dict[str, FinetuneConfig] = {}
    for recipe, seed in RUNS:
        one = replace(base, seed=seed, dataset=replace(base.dataset, data_seed=seed))
        if recipe != "A":
            one = replace(one, weights="ternary1.6")
        if recipe == "C":
            optimizer = replace(one.optimizer, moments="int8")
            one = replace(one, embedding_dtype="int8", optimizer=optimizer)
        found[f"{recipe}{seed}"] = one
    return found


def run(settings: Settings) -> dict[str, list[float]]:
    """The loss of every step of every run."""
    curves: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, cell in cells(config(settings, "")).items():
            output = Path(folder) / name
            finetune(replace(cell, output=str(output)), console=Console(stderr=True))
            lines = (output / "metrics.jsonl").read_text().splitlines()
            records = [json.loads(line) for line in lines]
            curves[name] = [r["loss"] for r in records if r.get("step", 0) > 0 and "loss" in r]
    return curves


def verdict(curves: dict[str, list[float]]) -> dict[str, Any]:
    """Mean distances between curves, in nats a step, and whether A and B are equal."""

    def apart(one: str, other: str) -> float:
        return float(np.mean(np.abs(np.subtract(curves[one], curves[other]))))

    seeds = sorted({seed for _, seed in RUNS})
    pairs = [(a, b) for a in seeds for b in seeds if a < b]
    return {
        "a_equals_b": curves["A0"] == curves["B0"],
        "c_from_a": {str(seed): apart(f"A{seed}", f"C{seed}") for seed in seeds},
        "a_between_seeds": {f"{a}-{b}": apart(f"A{a}", f"A{b}") for a, b in pairs},
        "last_20_steps": {name: float(np.mean(curve[-20:])) for name, curve in curves.items()},
    }


def main() -> None:
    """Runs everything and writes one record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("data", "tokenizer", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--model", default=Settings.model)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    given = parser.parse_args()
    settings = Settings(
        data=given.data, tokenizer=given.tokenizer, model=given.model, steps=given.steps
    )
    require_writable(given.out)
    curves = run(settings)
    record = {
        "experiment": "recipe_curves",
        "model": settings.model,
        "steps": settings.steps,
        "length": settings.length,
        "verdict": verdict(curves),
        "device": device_facts().to_dict(),
        "curves": {name: [round(x, 5) for x in curve] for name, curve in curves.items()},
    }
    write_json(given.out, record)
    print(json.dumps(record["verdict"], indent=2))


if __name__ == "__main__":
    main()
