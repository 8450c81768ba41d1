"""Records for reports, made by hand: figures that the reports must show."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fabric_jax.sweeps.identity import cell_digest
from fabric_jax.sweeps.records import Record, write_bundle

MIB = 1 << 20


def _make_record(
    experiment: str, platform: str, cell: dict[str, Any], metrics: dict[str, Any], **more: Any
) -> Record:
    values: dict[str, Any] = {
        "question": "A question?",
        "name": " ".join(f"{k}={v}" for k, v in cell.items()),
        "kind": "run",
        "status": "ok",
        "detail": None,
        "digest": cell_digest(experiment, platform, cell),
        "code": "0" * 16,
        "command": f"fabric-jax sweep experiments.{experiment} --platform {platform} --out DIR",
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": 1.0,
        "environment": {},
        "device": {"platform": "gpu", "kind": "A GPU", "packages": {"jax": "0.11.2"}},
        "figure": None,
        "columns": [],
    }
    return Record(
        experiment=experiment, platform=platform, cell=cell, metrics=metrics, **(values | more)
    )


def _memory_record(model: str, weights: str, recipe: str, mib: float, **more: Any) -> Record:
    metrics = {
        "peak_bytes": int(mib * MIB),
        "compiled_bytes": int(mib * MIB),
        "category_bytes": {"linears": int(mib * MIB / 2), "optimizer": int(mib * MIB / 2)},
    }
    cell = {"model": model, "weights": weights, "recipe": recipe, **more.pop("settings", {})}
    return _make_record("vram", "cuda", cell, {} if more.get("status") else metrics, **more)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """``folder(record, …)`` is a folder that holds these records as one bundle."""

    def write(*records: Record) -> Path:
        write_bundle(tmp_path / "records" / "all.jsonl", records)
        return tmp_path / "records"

    return write


@pytest.fixture
def make_record() -> Callable[..., Record]:
    """Of any experiment."""
    return _make_record


@pytest.fixture
def memory_record() -> Callable[..., Record]:
    """Of ``vram`` on cuda, with so many MiB."""
    return _memory_record
