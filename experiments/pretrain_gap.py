"""What does training with ternary weights cost? Loss against tokens, beside the same dense model.

A ternary model and a dense one of the same shape (sub-norms included) train from random weights on
Python's standard library: the same rows in the same order, the same budget, each with a learning
rate of its own kind. The ternary one takes the published two-stage recipe; the dense one a cosine
that ends at a tenth of its peak. Held-out files give bits per byte.

    PYTHONPATH=.:kernels python3 -m experiments.pretrain_gap --model bitnet-30m --tokens 13000000 \
        --rows 32 --length 512 --dtype bfloat16 --out gap-30m.json --figure gap-30m.png

On an H100 the two runs take about a minute and a half. The record is written after each of them.
The small model:

    PYTHONPATH=.:kernels python3 -m experiments.pretrain_gap --model bitnet-tiny --tokens 3000000 \
        --rows 8 --length 256 --vocab 4096 --dtype float32 --out gap-tiny.json --figure gap-tiny.png

On two CPU cores the first takes ``--tokens 131072 --rows 4 --length 256 --dtype float32
--held-out 0.01 --evaluations 2``: 700 tokens a second where nothing else runs. A larger share held
out takes longer to evaluate than that takes to train.
"""

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.arguments import add_settings
from experiments.stdlib_corpus import shared_corpus
from fabric_jax.data.config import DataConfig
from fabric_jax.data.stdlib import STDLIB
from fabric_jax.files import new_file, write_json
from fabric_jax.measurement.device import device_facts
from fabric_jax.models.registry import get_config
from fabric_jax.quantization.ste_options import SteOptions
from fabric_jax.training.config import OptimizerConfig, PretrainConfig
from fabric_jax.training.loop import pretrain
from fabric_jax.training.metrics import METRICS, SAMPLES
from fabric_jax.training.optimizer import warmup_steps
from fabric_jax.training.recipes import resolve

POINTS = 200
"""Of a curve in the record, each the mean of the steps around it."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What both models share.

    Attributes:
        model: registry name.
        tokens: positions to train on.
        rows: of a step.
        length: positions in a row.
        vocab: tokens of the BPE vocabulary learnt from the corpus.
        dtype: of activations; weights are float32.
        evaluations: during the run.
        held_out: share of the documents to evaluate on.
        ternary_rate: peak of the first stage; 0 for the published one.
        dense_rate: peak.
        samples: texts that each model writes after an evaluation.
        seed: of weights and order.
    """

    model: str = "bitnet-30m"
    tokens: int = 13_000_000
    rows: int = 32
    length: int = 512
    vocab: int = 8192
    dtype: str = "bfloat16"
    evaluations: int = 10
    held_out: float = 0.05
    ternary_rate: float = 0.0
    dense_rate: float = 1e-3
    samples: int = 0
    seed: int = 0


def config(settings: Settings, folder: str, corpus: str) -> PretrainConfig:
    """The ternary model's run, its output in ``folder``; ``corpus`` is where the text lies."""
    dtype: Any = settings.dtype
    return PretrainConfig(
        model=settings.model,
        output=str(Path(folder) / "ternary"),
        corpus=corpus,
        train_tokenizer=settings.vocab,
        dataset=DataConfig(
            data=STDLIB,
            eval_fraction=settings.held_out,
            max_length=settings.length,
            batch_size=settings.rows,
            data_seed=settings.seed,
        ),
        optimizer=ternary_optimizer(settings),
        token_budget=settings.tokens,
        eval_every=max(1, steps(settings) // settings.evaluations),
        save_every=0,
        keep_last=1,
        log_every=max(1, steps(settings) // POINTS),
        tensorboard=False,
        dtype=dtype,
        samples=settings.samples,
        sample_prompt="def ",
        seed=settings.seed,
    )


def steps(settings: Settings) -> int:
    return -(-settings.tokens // (settings.rows * settings.length))


def ternary_optimizer(settings: Settings) -> OptimizerConfig:
    """The recipe's, or with another peak, the second stage's at two thirds of it as published."""
    if not settings.ternary_rate:
        return OptimizerConfig()
    return OptimizerConfig(
        learning_rate=settings.ternary_rate,
        schedule="two-stage",
        second_learning_rate=settings.ternary_rate * 2 / 3,
    )


def cells(base: PretrainConfig, settings: Settings) -> dict[str, PretrainConfig]:
    """Both runs by name."""
    rate = settings.dense_rate
    dense = OptimizerConfig(
        learning_rate=rate,
        schedule="cosine",
        min_learning_rate=rate / 10,
        warmup_ratio=0.05,
        weight_decay=0.1,
        beta2=0.95,
    )
    plain = replace(
        base,
        output=str(Path(base.output).parent / "dense"),
        optimizer=dense,
        optimizer_defaults="plain",
        ste=SteOptions(weights="none"),
        act_quant="none",
    )
    return {"ternary": base, "dense": plain}


def measure(cell: PretrainConfig) -> dict[str, Any]:
    """Trains one model: its curves and what it came to."""
    summary = pretrain(cell, console=Console(stderr=True))
    output = Path(cell.output)
    lines = [json.loads(line) for line in (output / METRICS).read_text().splitlines()]
    per_step = cell.dataset.batch_size * cell.dataset.max_length * cell.accumulation
    optimizer = resolve(cell, get_config(cell.model).parameters).optimizer
    # As many as there were: two stages warm up for at most a tenth of the run.
    optimizer = replace(optimizer, warmup_steps=warmup_steps(optimizer, summary.steps))
    return {
        "loss": [[line["step"] * per_step, round(line["loss"], 4)] for line in lines],
        "held_out": [
            [line["step"] * per_step, round(line["eval_loss"], 5), line["eval_bits_per_byte"]]
            for line in lines
            if "eval_loss" in line
        ],
        "bits_per_byte": summary.eval_bits_per_byte_last,
        "eval_loss": summary.eval_loss_last,
        "parameters": summary.parameters,
        "tokens_per_second": summary.tokens_per_second,
        "seconds": summary.seconds,
        "optimizer": asdict(optimizer),
        **last_sample(output / SAMPLES),
    }


def last_sample(path: Path) -> dict[str, str]:
    """What the model wrote last, where it was asked to."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return {"last_sample": json.loads(lines[-1])["text"]} if lines else {}


def gap(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """What ternary costs: nats a token and bits a byte, both held out."""
    ternary, dense = results["ternary"], results["dense"]
    return {
        "nats_per_token": ternary["eval_loss"] - dense["eval_loss"],
        "bits_per_byte": ternary["bits_per_byte"] - dense["bits_per_byte"],
    }


def draw(record: dict[str, Any], path: str) -> None:
    """Training loss and held-out bits per byte against tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, result in record["results"].items():
        tokens, losses = zip(*result["loss"], strict=True)
        left.plot([t / 1e6 for t in tokens], losses, label=name, linewidth=1)
        at, _, bits = zip(*result["held_out"], strict=True)
        right.plot([t / 1e6 for t in at], bits, marker="o", markersize=3, label=name)
    left.set(xlabel="million tokens", ylabel="training loss, nats a token")
    right.set(xlabel="million tokens", ylabel="held-out bits per byte")
    left.set_ylim(top=min(7.0, left.get_ylim()[1]))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    model = record["settings"]["model"]
    figure.suptitle(f"{model}, ternary and dense, {record['device']['kind']}", fontsize=10)
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def main() -> None:
    """Trains both; one record, written after each, and a figure where one is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--figure", default="")
    parser.add_argument("--folder", default="", help="keep the runs here")
    add_settings(parser, Settings())
    given = vars(parser.parse_args())
    settings = Settings(**{name: given[name] for name in asdict(Settings())})
    corpus = shared_corpus(vocab=settings.vocab, held_out=settings.held_out)
    record: dict[str, Any] = {
        "experiment": "pretrain_gap",
        "settings": asdict(settings),
        "corpus": corpus.digest[:16],
        "gap": None,
        "device": device_facts().to_dict(),
        "results": {},
    }
    with tempfile.TemporaryDirectory() as temporary:
        base = config(settings, given["folder"] or temporary, str(corpus.folder))
        for name, cell in cells(base, settings).items():
            record["results"][name] = measure(cell)
            if len(record["results"]) == 2:
                record["gap"] = gap(record["results"])
            write_json(given["out"], record)
    print(settings.model, json.dumps(record["gap"], indent=2))
    if given["figure"]:
        draw(record, given["figure"])


if __name__ == "__main__":
    main()
