"""``fabric-jax memory``: what a fine-tuning job needs, before it runs and as measured."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fabric_jax.training.memory_account import MemoryAccount, MemoryConfig

Row = tuple[str, int | None, int | None, int | None]


def run(arguments: Sequence[str]) -> int:
    """Parses the flags, accounts, prints the table."""
    from fabric_jax.cli.arguments import parse
    from fabric_jax.training.memory_account import MemoryConfig, account

    config = parse(MemoryConfig, "memory", arguments)
    from fabric_jax.files import require_writable, write_json

    if config.json:
        require_writable(config.json)
    if config.fits:
        return _print_fitting(config)
    found = account(config)
    if config.json:
        write_json(config.json, found.to_dict())
    _print(found, config)
    return 0


def _print_fitting(config: "MemoryConfig") -> int:
    from fabric_jax.cli.output import bytes_text, console, print_table
    from fabric_jax.training.memory_account import largest_that_fits

    fitting = largest_that_fits(config)
    if config.json:
        from fabric_jax.files import write_json

        write_json(config.json, {"fits": config.fits, "analytic": dict(fitting)})
    if not fitting:
        console().print(f"no published size fine-tunes in {config.fits:g} GiB like this")
        return 1
    rows = [(name, bytes_text(total)) for name, total in fitting]
    print_table(f"fine-tune in {config.fits:g} GiB", ("model", "analytic"), rows)
    console().print(
        f"{fitting[-1][0]} is the largest, by its dimensions; what a process holds besides (on CPU "
        "some 200 MiB)\nis not in it."
    )
    return 0


def table_rows(found: "MemoryAccount") -> list[Row]:
    """(category, analytic, compiled, device) in bytes; None where a column doesn't know."""
    arrays, scratch = found.arrays, found.scratch
    compiled, measured = found.compiled, found.measured
    known = arrays.base + arrays.adapters + arrays.optimizer
    other = None if compiled is None else compiled.arguments - known
    temporaries = compiled and compiled.temporaries + compiled.outputs - compiled.aliased
    rows: list[Row] = [
        (name, size, None if compiled is None else size, None)
        for name, size in (
            ("linears", arrays.weights + arrays.scales),
            ("embedding and head", arrays.embedding_and_head),
            ("norms", arrays.norms),
            ("adapters", arrays.adapters),
            ("optimizer", arrays.optimizer),
        )
    ]
    rows += [
        ("batch and padding", 0, other, None),
        ("gradients", arrays.gradients, None, None),
        ("kept for the backward pass", scratch.kept, None, None),
        ("a layer at work, or the logits", scratch.total - scratch.kept, None, None),
        ("temporaries in all", found.analytic_step, temporaries, None),
        (
            "total",
            found.analytic,
            None if compiled is None else compiled.total,
            None if measured is None else measured.above_baseline,
        ),
    ]
    return rows


def _print(found: "MemoryAccount", config: "MemoryConfig") -> None:
    from fabric_jax.cli.output import bytes_text, console, print_table

    rows = [(name, *map(bytes_text, sizes)) for name, *sizes in table_rows(found)]
    print_table(
        f"{found.model}, {config.batch_size} x {config.max_length} positions, LoRA rank "
        f"{config.lora.rank}, {found.platform}"
        + (f"; each device of {found.mesh}" if found.mesh else ""),
        ("", "analytic", "compiled", "device"),
        rows,
    )
    out = console()
    for note in found.notes:
        out.print(note)
    compiled, measured = found.compiled, found.measured
    if compiled is not None:
        out.print(_difference("compiled", compiled.total, "analytic", found.analytic))
    if measured is not None and compiled is not None:
        out.print(_difference("device", measured.above_baseline, "compiled", compiled.total))
        out.print(
            f"device: peak of {bytes_text(measured.peak)} in {measured.steps} steps, less "
            f"{bytes_text(measured.baseline)} before the job"
        )
        if measured.driver_peak is not None:
            out.print(
                f"driver: {bytes_text(measured.driver_peak)} at most, "
                f"{bytes_text(measured.driver_baseline)} before the job; context, code and the "
                "allocator's pool included"
            )


def _difference(name: str, value: int, other: str, base: int) -> str:
    from fabric_jax.cli.output import bytes_text

    sign = "+" if value >= base else "-"
    return (
        f"{name} less {other}: {sign}{bytes_text(abs(value - base))} "
        f"({100 * (value - base) / base:+.1f} %)"
    )
