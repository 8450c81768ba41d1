"""``fabric-jax convert``: models and adapters from one format to another."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fabric_jax.conversion import ConvertConfig, Converted, Damage


def run(arguments: Sequence[str]) -> int:
    """Parses the flags, converts, prints what came out."""
    from fabric_jax.cli.arguments import parse
    from fabric_jax.conversion.config import ConvertConfig

    config = parse(ConvertConfig, "convert", arguments)
    from rich.console import Console

    from fabric_jax.conversion.convert import convert
    from fabric_jax.files import require_writable, write_json

    if config.json:
        require_writable(config.json)
    with Console(stderr=True).status("opening") as status:
        done = convert(config, lambda line: status.update(line))
    if config.json:
        write_json(config.json, _record(config, done))
    _print(config, done)
    return 0


def _record(config: "ConvertConfig", done: "Converted") -> dict[str, Any]:
    return {
        "config": asdict(config),
        "output": str(done.output),
        "sizes": None if done.sizes is None else asdict(done.sizes),
        "damage": None if done.damage is None else done.damage.to_dict(),
        "notes": list(done.notes),
    }


def _print(config: "ConvertConfig", done: "Converted") -> None:
    from fabric_jax.cli.output import bytes_text, console, print_table

    rows = [("written", str(done.output)), ("format", config.to)]
    if (sizes := done.sizes) is not None:
        rows += [
            ("size", bytes_text(sizes.total)),
            ("linears", bytes_text(sizes.linears)),
            ("bits for each of their weights", f"{sizes.bits_per_weight:.4f}"),
        ]
    print_table("converted", ("", ""), rows, left=2)
    if done.damage is not None:
        print_table(f"damage, on {config.text}", ("", ""), _damage_rows(done.damage), left=1)
    for note in done.notes:
        console().print(f"Note: {note}.", soft_wrap=True)


def _damage_rows(damage: "Damage") -> list[tuple[str, str]]:
    return [
        ("positions", f"{damage.positions:,}"),
        ("KL(adapted || merged), nats: mean", f"{damage.kl_mean:.4g}"),
        ("  median", f"{damage.kl_median:.4g}"),
        ("  99 %", f"{damage.kl_p99:.4g}"),
        ("  largest", f"{damage.kl_max:.4g}"),
        ("same most likely token", f"{damage.top1_agreement:.2%}"),
        ("perplexity: base alone", f"{damage.perplexity_base:.4g}"),
        ("  base with adapter", f"{damage.perplexity_before:.4g}"),
        ("  merged", f"{damage.perplexity_after:.4g}"),
    ]
