"""The figure of an accelerator's products against its limits."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from fabric_kernels.ternary_matmul.device_cases import Limits, Timing

from fabric_jax.report.roofline import main, parse_timings, position

LIMITS = Limits(bytes_per_second=4e12, bf16_per_second=7e14, int8_per_second=1.3e15)


def _record() -> dict[str, Any]:
    def one(product: str, implementation: str, packing: str, rows: int, us: float) -> list[Any]:
        timing = Timing(
            product=product,
            implementation=implementation,
            packing=packing,
            rows=rows,
            n=4096,
            k=2048,
            microseconds=us,
            spread=0.0,
            of_bandwidth=0.5,
            of_rate=0.5,
        )
        return list(asdict(timing).values())

    return {
        "device": "a device",
        "jax": "0",
        "limits": asdict(LIMITS),
        "columns": [field.name for field in fields(Timing)],
        "timings": [
            one("linear", "triton", "ternary2", 1, 2.0),
            one("linear", "mosaic_gpu", "ternary2", 1024, 20.0),
            one("linear_transposed", "dense-bf16", "", 1024, 25.0),
        ],
    }


def test_positions_count_the_bytes_of_each_form() -> None:
    limits, (few, _, dense) = parse_timings(_record())
    rows = 2 * (4096 + 2048)
    assert position(few, limits) == pytest.approx(
        (2 * 4096 * 2048 / (4096 * 2048 / 4 + rows), 2 * 4096 * 2048 / 2e-6)
    )
    operations = 2 * 1024 * 4096 * 2048
    assert position(dense, limits) == pytest.approx(
        (operations / (2 * 4096 * 2048 + 1024 * rows), operations / 25e-6)
    )


def test_writes_a_figure(tmp_path: Path) -> None:
    (tmp_path / "timings.json").write_text(json.dumps(_record()), encoding="utf-8")
    assert main([str(tmp_path / "timings.json"), str(tmp_path / "figure.svg")]) == 0
    assert (tmp_path / "figure.svg").read_text(encoding="utf-8").startswith("<svg")


def test_refuses_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "timings.json").write_text("{}", encoding="utf-8")
    assert main([str(tmp_path / "timings.json"), str(tmp_path / "figure.svg")]) == 2
    assert "bench_device" in capsys.readouterr().err
    assert not (tmp_path / "figure.svg").exists()
