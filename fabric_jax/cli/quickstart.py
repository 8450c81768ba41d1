"""``fabric-jax quickstart``: everything once, on a model small enough for two CPU cores."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fabric_jax.evaluation import TaskAccuracy
    from fabric_jax.quickstart.report import Report

Row = tuple[str, ...]


def run(arguments: Sequence[str]) -> int:
    """Parses the flags, runs the quickstart, prints its table and what to try next."""
    from fabric_jax.cli.arguments import parse
    from fabric_jax.quickstart.settings import QuickstartConfig

    config = parse(QuickstartConfig, "quickstart", arguments)
    from fabric_jax.quickstart.run import run_quickstart

    report = run_quickstart(config)
    show(report)
    return 0


def show(report: "Report") -> None:
    """Prints the table, a few answers and what to try next."""
    from fabric_jax.cli.output import print_table

    print()
    print_table(_title(report), ("", "", ""), _rows(report))
    for answer in report.answers:
        print(
            f"{answer.question}  expected {answer.expected}; "
            f"before: {answer.before.strip()!r}, after: {answer.after.strip()!r}"
        )
    print(f"\nEverything is in {report.output}: the packed model and its vocabulary in model, the")
    print("adapter in finetune/adapter, rows in data, curves.png, summary.json. To go on:\n")
    for command in next_commands(report):
        print(f"  {command}")


def _title(report: "Report") -> str:
    run = report.finetuning
    return (
        f"{run.model}, {run.parameters:,} parameters, on {run.cores} cores of {run.cpu}: "
        f"{report.seconds:.0f} s, seed {report.seed}"
    )


def _rows(report: "Report") -> list[Row]:
    return [
        *_accuracy_rows(report),
        ("", "", ""),
        *_training_rows(report),
        ("", "", ""),
        *_memory_rows(report),
    ]


def _accuracy_rows(report: "Report") -> list[Row]:
    from fabric_jax.quickstart.report import both

    run = report.finetuning
    likelihood, generation = both(report.likelihood), both(report.generation)
    return [
        (f"{likelihood[0].scores.total} HELD-OUT QUESTIONS", "before LoRA", "after"),
        ("accuracy, most likely label", *map(_percent, likelihood)),
        ("  95% interval", *map(_interval, likelihood)),
        ("accuracy, generated answer", *map(_percent, generation)),
        ("  95% interval", *map(_interval, generation)),
        ("loss, nats a token", _loss(run.eval_loss_first), _loss(run.eval_loss_last)),
    ]


def _training_rows(report: "Report") -> list[Row]:
    scratch, lora = report.pretraining, report.finetuning
    runs = (scratch, lora)
    return [
        ("TRAINING", "from scratch", f"LoRA, {lora.implementation} kernel"),
        ("rows", f"{report.statements:,} statements", f"{report.questions:,} questions"),
        ("trained parameters", *(f"{run.trained_parameters:,}" for run in runs)),
        ("steps", *(f"{run.steps:,}" for run in runs)),
        ("loss of the first step", *(_loss(run.loss_first) for run in runs)),
        ("loss of the last step", *(_loss(run.loss_last) for run in runs)),
        ("tokens/s", *(f"{run.tokens_per_second:,.0f}" for run in runs)),
        ("seconds training", *(f"{run.seconds:.0f}" for run in runs)),
        ("seconds compiling", *(f"{run.compile_seconds:.0f}" for run in runs)),
    ]


def _memory_rows(report: "Report") -> list[Row]:
    packed, f16 = report.sizes.packed, report.sizes.f16
    columns = (packed, f16)
    parts = [
        ("weights and scales of linears", [c.weights + c.scales for c in columns]),
        ("embedding, also the head", [c.embedding_and_head for c in columns]),
        ("norms", [c.norms for c in columns]),
        ("base model", [c.base for c in columns]),
        ("adapter", [c.adapters for c in columns]),
        ("optimizer", [c.optimizer for c in columns]),
        ("in all", [c.total for c in columns]),
    ]
    rows = [(name, *(f"{count:,}" for count in counts)) for name, counts in parts]
    return [("BYTES", "this run", "same model in f16"), *rows]


def _percent(task: "TaskAccuracy") -> str:
    return f"{task.scores.accuracy:.1%}"


def _interval(task: "TaskAccuracy") -> str:
    low, high = task.scores.interval
    return f"{low:.1%} to {high:.1%}"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def next_commands(report: "Report") -> list[str]:
    """Command lines that go on from what the quickstart made."""
    import shlex
    from pathlib import Path

    from fabric_jax.quickstart.stages import Layout

    layout = Layout(Path(report.output))
    model = ["--model", layout.model]
    adapter = ["--adapter", layout.finetuning / "adapter"]
    data = ["--data", layout.questions, "--eval-data", layout.held_out, "--max-length", 64]
    rates = ["--batch-size", 8, "--epochs", 20, "--learning-rate", "2e-3"]
    commands = [
        ["fabric-jax", "evaluate", *model, *adapter, "--data", layout.held_out],
        ["fabric-jax", "finetune", *model, *data, *rates, "--rank", 4, "--output", "runs/mine"],
        ["tensorboard", "--logdir", layout.root],
    ]
    return [shlex.join(map(str, command)) for command in commands]
