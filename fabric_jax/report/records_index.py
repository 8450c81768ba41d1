"""Finding records, and their figures as text."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fabric_jax.report.document import Value
from fabric_jax.sweeps.records import Record

MIB = 1 << 20
FAILED = {
    "out_of_memory": "out of memory",
    "crash": "crashed",
    "timeout": "time out",
    "unsupported": "not on this platform",
}

AS_PUBLISHED: dict[str, dict[str, Any]] = {
    "vram": {"rows": 1, "length": 128, "rank": 8, "implementation": "auto"},
    "finetune_throughput": {
        **{"weights": "ternary2", "rank": 8, "implementation": "auto"},
        **{"data": "", "compile_only": False},
    },
    "decode_throughput": {
        **{"batch": 1, "prompt": 32, "new": 256, "implementation": ""},
        **{"table": "bfloat16", "cache": ""},
    },
}
"""What a cell beside a published figure has, where it has that setting at all; cells with other
settings are in the table of their experiment alone."""


@dataclass(frozen=True)
class Index:
    """All records of a report, with where each stands."""

    places: tuple[tuple[str, Record], ...]

    @property
    def records(self) -> list[Record]:
        """Without their places."""
        return [record for _, record in self.places]

    def find(self, experiment: str, platform: str = "", **cell: Any) -> list[Record]:
        """Records of an experiment whose settings are these, the newest first."""
        found = [
            record
            for record in self.records
            if record.experiment == experiment
            and platform in ("", record.platform)
            and all(record.cell.get(key) == value for key, value in cell.items())
        ]
        return sorted(found, key=lambda record: record.started, reverse=True)

    def comparable(self, experiment: str, platform: str = "", **cell: Any) -> list[Record]:
        """Those of :meth:`find` that may stand beside published figures."""
        wanted = AS_PUBLISHED.get(experiment, {})
        return [
            record
            for record in self.find(experiment, platform, **cell)
            if all(record.cell.get(key, value) == value for key, value in wanted.items())
        ]

    def first(self, experiment: str, platform: str = "", **cell: Any) -> Record | None:
        """Of those that may be compared the newest that went well, else the newest, else None."""
        found = self.comparable(experiment, platform, **cell)
        well = [record for record in found if record.status == "ok"]
        return (well or found or [None])[0]

    def platforms(self, experiment: str) -> list[str]:
        """Those with records of an experiment, devices first."""
        order = {"cuda": 0, "cpu": 1}
        names = {record.platform for record in self.records if record.experiment == experiment}
        return sorted(names, key=lambda name: (order.get(name, 2), name))

    def experiments(self) -> list[str]:
        """Names of experiments."""
        return sorted({record.experiment for record in self.records})


def figure_of(record: Record | None, metrics: Sequence[str], show: Callable[[float], str]) -> Value:
    """The first of these metrics that a record has, its failure, or a dash where there is none."""
    if record is None:
        return Value("–")
    if record.status != "ok":
        return Value(FAILED[record.status], record.digest, "bad")
    for name in metrics:
        value = record.metrics.get(name)
        if value is not None:
            mark = "" if record.kind == "run" else " *"
            return Value(show(value) + mark, record.digest)
    return Value("–", record.digest)


def number(record: Record | None, *metrics: str) -> float | None:
    """The first of these metrics that a record has."""
    if record is None or record.status != "ok":
        return None
    found = (record.metrics.get(name) for name in metrics)
    return next((value for value in found if value is not None), None)


MEMORY = ("peak_bytes", "compiled_bytes")
"""What a record knows best of a job's memory: the device's peak, else the compiler's plan."""


def mib(count: float) -> str:
    """Bytes in MiB."""
    return f"{count / MIB:,.0f}"


def short(value: Any, name: str = "") -> str:
    """A metric for people; its unit is in its name."""
    if value is None:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    if not isinstance(value, int | float):
        return "…"
    if name.endswith("_bytes"):
        return f"{value / MIB:,.0f} MiB" if value >= 10 * MIB else f"{value / MIB:.2f} MiB"
    if isinstance(value, int):
        return f"{value:,}"
    if name.endswith("_seconds"):
        return f"{value:.1f} s" if value >= 10 else f"{value * 1e3:.4g} ms"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 0.1 else f"{value:.4g}"


def is_whole(record: Record) -> bool:
    """Whether all steps of the epoch ran."""
    return record.metrics["steps_run"] == record.metrics["epoch_steps"]


def how(records: Iterable[Record]) -> str:
    """``run on cuda (a GPU), compiled for cpu``: what was done to get figures."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        found.setdefault((record.platform, record.kind), []).append(record)
    return ", ".join(
        f"run on {platform} ({device_name(own)})" if kind == "run" else f"{kind} for {platform}"
        for (platform, kind), own in found.items()
    )


def title(name: str) -> str:
    """A metric's name without its unit: ``step_seconds`` as ``step``."""
    for unit in ("_seconds", "_bytes"):
        name = name.removesuffix(unit)
    return name.replace("_per_second", " a second").replace("_", " ")


def device_name(records: Iterable[Record]) -> str:
    """The devices that records are of."""
    names: dict[str, None] = {}
    for record in records:
        facts = record.device
        kind = str(facts.get("kind", ""))
        if record.platform == "cpu" or facts.get("platform") in ("cpu", "host"):
            kind = f"{facts.get('cpu', kind)}, {facts.get('cores', '?')} cores"
        if facts.get("platform") != "host":
            names[kind] = None
    return "; ".join(names) or "no device"
