"""What the quickstart found: flat keys for ``summary.json``, and the curves."""

import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fabric_jax.evaluation import Comparison, TaskAccuracy
from fabric_jax.files import write_atomically
from fabric_jax.quickstart.stages import Sizes
from fabric_jax.training.metrics import METRICS
from fabric_jax.training.summary import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One held-out question and what the model generated."""

    question: str
    expected: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """Results of one quickstart.

    Attributes:
        output: folder with everything it made.
        seed: of the run.
        vocab_size: tokens of the vocabulary learnt from the corpus.
        statements: sentences that the base model read.
        questions: questions that the adapter was trained on.
        pretraining: the run from random weights.
        finetuning: the run of LoRA.
        likelihood: held-out answers by the most likely label.
        generation: held-out answers by the first word of the generated text.
        sizes: bytes by category.
        answers: examples, one for each class.
        seconds: wall time of the whole quickstart.
    """

    output: str
    seed: int
    vocab_size: int
    statements: int
    questions: int
    pretraining: Summary
    finetuning: Summary
    likelihood: Comparison
    generation: Comparison
    sizes: Sizes
    answers: tuple[Answer, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Flat keys and JSON values; those of the runs that are not named otherwise are LoRA's."""
        before, after = both(self.likelihood)
        generated_before, generated_after = both(self.generation)
        scratch = self.pretraining
        return {
            **_accuracy("accuracy_before", before),
            **_accuracy("accuracy_after", after),
            **_accuracy("generation_accuracy_before", generated_before),
            **_accuracy("generation_accuracy_after", generated_after),
            "held_out_questions": before.scores.total,
            "bytes_packed": self.sizes.packed.base,
            "bytes_f16": self.sizes.f16.base,
            **{f"bytes_packed_{k}": v for k, v in _categories(self.sizes.packed).items()},
            **{f"bytes_f16_{k}": v for k, v in _categories(self.sizes.f16).items()},
            "pretrain_loss_first": scratch.loss_first,
            "pretrain_loss_last": scratch.loss_last,
            "pretrain_tokens_per_second": scratch.tokens_per_second,
            "pretrain_steps": scratch.steps,
            "pretrain_seconds": scratch.seconds,
            "pretrain_compile_seconds": scratch.compile_seconds,
            "vocab_size": self.vocab_size,
            "statements": self.statements,
            "questions": self.questions,
            "seed": self.seed,
            "answers": [asdict(answer) for answer in self.answers],
            **self.finetuning.to_json(),
            "finetune_seconds": self.finetuning.seconds,
            "output": self.output,
            "seconds": self.seconds,
        }


def both(comparison: Comparison) -> tuple[TaskAccuracy, TaskAccuracy]:
    """The accuracy without and with the adapter; both were measured."""
    assert comparison.adapter is not None
    before, after = comparison.base.accuracy, comparison.adapter.accuracy
    assert before is not None
    assert after is not None
    return before, after


def _accuracy(name: str, task: TaskAccuracy) -> dict[str, float]:
    low, high = task.scores.interval
    return {name: task.scores.accuracy, f"{name}_low": low, f"{name}_high": high}


def _categories(sizes: Any) -> dict[str, int]:
    """Measured categories only."""
    return {name: count for name, count in asdict(sizes).items() if count is not None}


def plot_curves(path: Path, pretraining: Path, finetuning: Path) -> None:
    """Draws the losses of both runs, from their folders, into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _curve(left, pretraining, "training from scratch, straight-through", (("loss", "statements"),))
    _curve(
        right,
        finetuning,
        "LoRA on packed 2-bit weights",
        (("loss", "questions"), ("eval_loss", "held-out questions")),
    )
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_atomically(path, image.getvalue())


def _curve(axes: "Axes", run: Path, title: str, series: tuple[tuple[str, str], ...]) -> None:
    records = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    for key, label in series:
        points = [(record["step"], record[key]) for record in records if key in record]
        axes.plot(*zip(*points, strict=True), marker=".", label=label)
    axes.set(title=title, xlabel="step", ylabel="loss, nats a token", yscale="log")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
