"""Tables of measured times, and what follows from them."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import TernaryWeight, pack, select_implementation, ternary_linear
from fabric_kernels.ternary_matmul import tuned_table
from fabric_kernels.ternary_matmul.select import products, resolve
from fabric_kernels.ternary_matmul.tuned_table import parse_table, table_name

COLUMNS = ["product", "implementation", "packing", "rows", "n", "k", "microseconds"]


def record(*timings: list[Any], capability: str = "9.0") -> dict[str, Any]:
    return {
        "device": "Some GPU",
        "compute_capability": capability,
        "columns": COLUMNS,
        "timings": list(timings),
    }


FEW = [
    ["linear", "triton", "ternary2", 1, 256, 256, 2.0],
    ["linear", "xla", "ternary2", 1, 256, 256, 3.0],
    ["linear", "dense-bf16", "", 1, 256, 256, 1.0],
    ["linear", "triton", "ternary2", 512, 256, 256, 9.0],
    ["linear", "xla", "ternary2", 512, 256, 256, 4.0],
    ["linear_transposed", "xla", "ternary2", 1, 256, 256, 5.0],
]


def test_the_fastest_of_the_most_similar_product_is_picked() -> None:
    table = parse_table(record(*FEW))
    assert table.pick("linear", "ternary2", 1, 256, 256) == "triton"
    assert table.pick("linear", "ternary2", 3, 4096, 256) == "triton"
    assert table.pick("linear", "ternary2", 2048, 256, 256) == "xla"
    assert table.pick("linear_transposed", "ternary2", 1, 9, 9) == "xla"
    # What was never measured runs everywhere.
    assert table.pick("linear", "ternary1.6", 1, 256, 256) == "xla"


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """This process as one with a GPU, whose tables are in the folder."""

    class Device:
        platform, device_kind, compute_capability = "gpu", "Some GPU", "9.0"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    monkeypatch.setenv(tuned_table.VARIABLE, str(tmp_path))
    tuned_table._find.cache_clear()
    yield tmp_path
    tuned_table._find.cache_clear()


def test_a_table_is_used_where_there_is_one(on_a_gpu: Path) -> None:
    (on_a_gpu / table_name("Some GPU")).write_text(json.dumps(record(*FEW)))
    assert select_implementation() == "tuned"
    assert select_implementation("xla") == "xla"
    codes = np.random.default_rng(0).integers(-1, 2, (24, 40)).astype(np.int8)
    weight = TernaryWeight(pack(jnp.asarray(codes), "ternary2"), jnp.float32(0.5), None, 40)
    assert resolve("tuned", "linear", 1, weight) == "triton"
    assert resolve("xla", "linear", 1, weight) == "xla"
    for rows in (1, 600):
        x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, 40)), jnp.float32)
        (found,) = ternary_linear(x, (weight,))
        (expected,) = products("xla").linear(x, (weight,))
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_broken_table_is_named(on_a_gpu: Path) -> None:
    (on_a_gpu / table_name("Some GPU")).write_text('{"columns": []}')
    with pytest.raises(ValueError, match=r"some-gpu\.json is no table .* delete it or run that"):
        select_implementation()


def test_tuned_needs_a_table() -> None:
    with pytest.raises(ValueError, match="no table for cpu: choose another implementation"):
        select_implementation("tuned")


def test_names_of_files() -> None:
    assert table_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"


def test_a_launch_for_each_matrix_must_pay() -> None:
    near = [
        ["linear", "triton", "ternary2", 64, 256, 256, 10.0],
        ["linear", "mosaic_gpu", "ternary2", 64, 256, 256, 9.0],
        ["linear", "triton", "ternary2", 4096, 256, 256, 100.0],
        ["linear", "mosaic_gpu", "ternary2", 4096, 256, 256, 90.0],
    ]
    table = parse_table(record(*near))
    assert table.pick("linear", "ternary2", 64, 256, 256) == "triton"
    assert table.pick("linear", "ternary2", 4096, 256, 256) == "mosaic_gpu"


def test_the_shipped_tables() -> None:
    """Their devices are found by name, and others of their kind by what they can compute."""
    own = tuned_table._find("NVIDIA H200", "9.0", None)
    assert own is not None
    assert tuned_table._find("NVIDIA H100 80GB HBM3", "9.0", None) == own
    assert tuned_table._find("NVIDIA A100-SXM4-40GB", "8.0", None) is None
    assert own.pick("linear", "ternary2", 1, 2048, 2048) == "triton"
    assert own.pick("linear", "ternary2", 8192, 3584, 2048) == "mosaic_gpu"
    # The Mosaic kernel has no such layout: it can't have been measured.
    assert own.pick("linear", "ternary1.6", 8192, 3584, 2048) in ("xla", "triton")
