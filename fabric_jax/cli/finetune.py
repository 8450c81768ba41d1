"""``fabric-jax finetune``: a LoRA fine-tuning run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fabric_jax.training.summary import Summary


def run(arguments: Sequence[str]) -> int:
    """Parses the flags, fine-tunes, prints the result and where it lies."""
    from fabric_jax.cli.arguments import parse
    from fabric_jax.training.config import FinetuneConfig

    config = parse(FinetuneConfig, "finetune", arguments)
    from fabric_jax.training.loop import finetune

    summary = finetune(config)
    from fabric_jax.parallel.processes import is_first

    if is_first():
        _print(summary)
    return 0


def _print(summary: "Summary") -> None:
    from fabric_jax.cli.output import bytes_text, print_table

    rows = [
        ("steps", f"{summary.steps:,} ({summary.epochs:.4g} epochs)"),
        ("loss", _from_to(summary.loss_first, summary.loss_last)),
        ("evaluation loss", _from_to(summary.eval_loss_first, summary.eval_loss_last)),
        ("tokens a second", f"{summary.tokens_per_second:,.1f}"),
        ("peak memory", bytes_text(summary.peak_bytes)),
        ("of that as compiled", bytes_text(summary.compiled_bytes)),
        ("by dimensions", bytes_text(summary.analytic_bytes)),
        ("adapter", summary.trained),
        ("best adapter", summary.best or ""),
    ]
    print_table("fine-tuned", ("", ""), [row for row in rows if row[1]], left=2)


def _from_to(first: float | None, last: float | None) -> str:
    """``2.3026 to 1.1513``, empty where nothing was measured."""
    return "" if first is None or last is None else f"{first:.4f} to {last:.4f}"
