"""The self-test finds what is wrong in each product, and names whose."""

from collections.abc import Callable
from typing import Any

import jax
import pytest
from fabric_kernels import cpu_library, ternary_linear, ternary_matmul, ternary_matmul_transposed

from fabric_jax.measurement import self_test as module
from fabric_jax.measurement.self_test import EXACT, self_test

# Two packings of: sums of five rows and of one, and the three float products of five rows.
TOTAL = 2 * (5 * 48 + 48 + 5 * 131 + 5 * 48 + 5 * 131)


def test_this_device_is_exact():
    assert self_test() == EXACT


def off_by_one(call: Callable[..., Any], implementation: str) -> Callable[..., Any]:
    """``call``, but one value of its (first) output is wrong by 1 in one implementation."""

    def wrong(*arguments: Any, **named: Any) -> Any:
        found = call(*arguments, **named)
        if named["implementation"] != implementation:
            return found
        if isinstance(found, jax.Array):
            return found.at[0, 3].add(1)
        return (found[0].at[0, 3].add(1), *found[1:])

    return wrong


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
@pytest.mark.parametrize(
    ("call", "differing"),
    # Of each packing, the first is called twice.
    [(ternary_matmul, 4), (ternary_matmul_transposed, 2), (ternary_linear, 2)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_one_wrong_value_is_found(
    monkeypatch: pytest.MonkeyPatch, call: Callable[..., Any], differing: int, implementation: str
):
    if implementation == "cpu" and not cpu_library.available():
        pytest.skip(cpu_library.status().problem)
    monkeypatch.setattr(module, call.__name__, off_by_one(call, implementation))
    assert self_test() == f"{implementation}: {differing} of {TOTAL} values differ"


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch):
    def twice(x: jax.Array, *arguments: Any, **named: Any) -> tuple[jax.Array, ...]:
        right = ternary_linear(x, *arguments, **named)
        # The values stay; their gradient doubles.
        return tuple(2 * y - jax.lax.stop_gradient(y) for y in right)

    monkeypatch.setattr(module, "ternary_linear", twice)
    assert f"of {TOTAL} values differ" in self_test()
