"""``fabric-jax doctor``: what this machine offers and what is missing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fabric_kernels.cpu_library import CpuLibraryStatus

    from fabric_jax.measurement.health import Health


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Devices, versions, memory, kernels and missing parts of this machine.

    Exit code 0 if it can train, else 1.

    Attributes:
        json: print JSON instead of tables.
    """

    json: bool = False


def run(arguments: Sequence[str]) -> int:
    """Parses the flags, checks, prints; 0 if this machine can train, else 1."""
    from fabric_jax.cli.arguments import parse

    options = parse(DoctorOptions, "doctor", arguments)
    from fabric_jax.cli.output import print_json
    from fabric_jax.measurement.health import check_health

    health = check_health(Path.cwd())
    if options.json:
        print_json(health.to_dict())
    else:
        _print(health)
    return 0 if health.can_train else 1


def _print(health: "Health") -> None:
    from fabric_jax.cli.output import bytes_text, console, print_table

    facts = health.facts
    versions = ", ".join(f"{name} {number}" for name, number in facts.packages.items())
    folder = health.folder
    writable = f"cannot be written: {folder.problem}" if folder.problem else "writable"
    machine = [
        ("system", facts.system),
        ("processor", f"{facts.cpu}, {facts.cores} cores"),
        ("instructions", " ".join(facts.cpu_features) or "none that matter here"),
        ("memory", bytes_text(facts.host_memory_bytes)),
        ("python", facts.python),
        ("packages", versions),
        ("CPU kernels", _cpu_kernels(health.cpu_kernels)),
        ("folder", f"{folder.path}: {writable}, {bytes_text(folder.free_bytes)} free"),
        *((name, value) for name, value in health.environment.items()),
    ]
    print_table("machine", ("", ""), machine, left=2)
    devices = [
        (
            str(device.index),
            device.platform,
            device.kind,
            device.implementation,
            device.self_test,
            bytes_text(device.memory_bytes),
        )
        for device in health.devices
    ]
    columns = ("device", "platform", "kind", "ternary_matmul", "self-test", "memory")
    print_table("devices", columns, devices, left=5)
    if health.missing:
        missing = [
            (item.part.name, item.part.purpose, "yes" if item.part.required else "no", item.command)
            for item in health.missing
        ]
        print_table("not installed", ("part", "for", "required", "command"), missing, left=4)
    verdict = "This machine can train." if health.can_train else "This machine cannot train yet."
    console().print(verdict)


def _cpu_kernels(status: "CpuLibraryStatus") -> str:
    library = status.library
    if library is None:
        return f"none, products run on XLA: {status.problem}. {status.fix}."
    origin = {"shipped": "part of the package", "built": "built on this machine"}[library.origin]
    return f"{library.isa}, {origin} by {library.compiler}: {library.path}"
