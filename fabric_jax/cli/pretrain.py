"""``fabric-jax pretrain``: training of all weights with straight-through estimators."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fabric_jax.training.summary import Summary


def run(arguments: Sequence[str]) -> int:
    """Parses the flags, trains, prints the result, where it lies and how to pack it."""
    from fabric_jax.cli.arguments import parse
    from fabric_jax.training.config import PretrainConfig

    config = parse(PretrainConfig, "pretrain", arguments)
    from fabric_jax.training.loop import pretrain

    summary = pretrain(config)
    from fabric_jax.parallel.processes import is_first

    if not is_first():
        return 0
    _print(summary)
    packs = not config.ste.beyond_packed
    if packs:
        print(f"\nTo pack it:\n  fabric-jax convert {config.output} packed --to ternary2")
    return 0


def _print(summary: "Summary") -> None:
    from fabric_jax.cli.output import bytes_text, print_table

    bits = summary.eval_bits_per_byte_last
    rows = [
        ("steps", f"{summary.steps:,} ({summary.epochs:.4g} epochs)"),
        ("tokens", f"{summary.real_tokens:,}"),
        ("loss", _from_to(summary.loss_first, summary.loss_last)),
        ("evaluation loss", _from_to(summary.eval_loss_first, summary.eval_loss_last)),
        ("bits per byte", "" if bits is None else f"{bits:.4f}"),
        ("tokens a second", f"{summary.tokens_per_second:,.1f}"),
        ("peak memory", bytes_text(summary.peak_bytes)),
        ("of that as compiled", bytes_text(summary.compiled_bytes)),
        ("weights", summary.trained),
    ]
    print_table("trained", ("", ""), [row for row in rows if row[1]], left=2)


def _from_to(first: float | None, last: float | None) -> str:
    """``2.3026 to 1.1513``, empty where nothing was measured."""
    return "" if first is None or last is None else f"{first:.4f} to {last:.4f}"
