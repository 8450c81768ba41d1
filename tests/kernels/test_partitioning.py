"""Products of sharded arguments in plain ``jit`` are divided where their weights lie."""

from typing import Any

import pytest

from tests.kernels.conftest import need_cpu_kernels
from tests.parallel.virtual_devices import run_program

TOLERANCE = {"cpu": 1e-4, "xla": 2e-5}
"""Of what isn't a sum of integers, as a part of the largest: on CPU a gradient is in 16 bits of the
largest of a device's outputs."""
LAYERS_TOLERANCE = 1e-3
"""An int8 code at a tie may turn over in the next layer."""


@pytest.mark.parametrize(
    ("implementation", "amount", "least"),
    [
        ("cpu", "some", 19),
        pytest.param("cpu", "everything", 60, marks=pytest.mark.slow),
        pytest.param("xla", "everything", 60, marks=pytest.mark.slow),
    ],
)
def test_programs_are_divided_and_no_packed_weight_is_moved(
    implementation: str, amount: str, least: int
) -> None:
    if implementation == "cpu":
        need_cpu_kernels()
    found: dict[str, dict[str, Any]] = run_program(
        "partitioned", implementation, amount, of="kernels"
    )
    assert len(found) >= least
    for case, result in found.items():
        bits, layers = "bits" in case, "layers" in case
        most = 0 if bits else LAYERS_TOLERANCE if layers else TOLERANCE[implementation]
        assert result["error"] <= most, (case, result)
        assert not any(move.startswith("u8") for move in result["moves"]), (case, result)
        assert result["as expected"], (case, result)
        if case.startswith(("inputs", "both:")):
            # Absmax and sums of codes.
            assert "s32 all-reduce" in result["moves"] or "floats" in case, (case, result)
        elif case.startswith(("outputs", "rows:", "both axes of rows:")) and bits:
            assert result["moves"] == [], (case, result)
