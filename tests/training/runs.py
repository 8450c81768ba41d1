"""What tests read of a run's output, and a way to make a run crash."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fabric_jax.data.batch_stream import BatchStream

CLOCK = {
    "seconds",
    "peak_bytes",
    "trainable_tokens_per_second",
    "real_tokens_per_second",
    "positions_per_second",
}
"""Fields of metrics that differ from run to run."""


class Crash(Exception):
    """The process dies, as far as the run is concerned."""


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def timeless(output: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in metrics(output)]


def adapter_bytes(output: Path, name: str = "adapter") -> bytes:
    return (output / name / "adapter_model.safetensors").read_bytes()


def steps_saved(output: Path) -> list[int]:
    return sorted(int(p.name) for p in (output / "checkpoints").iterdir() if p.name.isdigit())


@contextmanager
def crash_at_batch(number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The data source raises instead of giving the batch of this number, from 1."""
    take, count = BatchStream.__next__, 0

    def counted(self: BatchStream) -> Any:
        nonlocal count
        count += 1
        if count == number:
            raise Crash
        return take(self)

    with monkeypatch.context() as patch:
        patch.setattr(BatchStream, "__next__", counted)
        with pytest.raises(Crash):
            yield
