"""Adapters in the epilogues of Hopper's products, against float64."""

from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from fabric_kernels.ternary_matmul import mosaic_gpu, mosaic_gpu_share, triton_group

from tests.kernels.linear_problems import Problem, expected_outputs
from tests.kernels.test_ternary_linear import BFLOAT16, assert_within
from tests.kernels.test_triton_adapters import assert_right
from tests.kernels.test_triton_kernel import ON_GPU


def interpret() -> Any:
    # Both supported versions of jax have it, not yet where users look.
    return import_module("jax._src.pallas.mosaic_gpu.interpret.params").InterpretGPUParams()


@pytest.mark.skipif(ON_GPU, reason="interpreted")
def test_interpreted_forward() -> None:
    problem = Problem(n=(64,), k=320, leading=(60,), ranks=(16,), dtype="bfloat16")
    given = problem.x, problem.weights, problem.adapters
    (y,), _ = mosaic_gpu.linear_with_adapters(*given, interpret=interpret())
    assert_within(y, expected_outputs(problem)[0], BFLOAT16)


@pytest.mark.skipif(ON_GPU, reason="interpreted")
@pytest.mark.parametrize("ranks", [(3, 17), (None, 8)])
def test_interpreted_backward(
    ranks: tuple[int | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two matrices and two blocks of k."""
    monkeypatch.setattr(mosaic_gpu, "LEAST_TOKENS", 1)
    problem = Problem(n=(64, 64), k=320, leading=(60,), ranks=ranks, dtype="bfloat16")
    own = [one for one in problem.adapters if one is not None]
    given = problem.gradients, problem.weights, problem.adapters
    narrow = [triton_group.narrow_of_all(problem.x, own)]
    # Interpreted kernels that run beside others may wait for their threads for ever.
    jax.block_until_ready((problem.x, *given, narrow))
    dx, pairs = mosaic_gpu.transposed_with_adapters(
        problem.x, *given, narrow, interpret=interpret()
    )
    assert_right(problem, exact_outputs(problem), dx, pairs)


def exact_outputs(problem: Problem) -> list[jax.Array]:
    """Where the outputs are not in question."""
    return [jnp.asarray(y.value, problem.dtype) for y in expected_outputs(problem)]


def test_what_is_not_for_the_epilogue() -> None:
    problem = Problem(n=(8, 8), k=64, leading=(4,), ranks=(3, 17), dtype="bfloat16")
    for dtype, adapters in (("bfloat16", problem.adapters), ("float32", problem.adapters[:1])):
        shares = mosaic_gpu_share.shares_of(problem.x, adapters, jnp.dtype(dtype))
        assert shares == [None] * len(adapters)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    "problem",
    [
        Problem(n=(264, 512), k=1152, leading=(300,), ranks=(8, 16), dtype="bfloat16"),
        Problem(
            n=(2048, 2048, 64), k=2048, leading=(2, 1024), ranks=(8, None, 2), dtype="bfloat16"
        ),
        Problem(n=(130,), k=515, leading=(130,), ranks=(33,), dtype="bfloat16"),
    ],
    ids=str,
)
def test_on_a_gpu(problem: Problem) -> None:
    given = problem.weights, problem.adapters
    outputs, narrow = jax.jit(mosaic_gpu.linear_with_adapters)(problem.x, *given)
    backward = jax.jit(mosaic_gpu.transposed_with_adapters)
    dx, pairs = backward(problem.x, problem.gradients, *given, narrow)
    assert_right(problem, outputs, dx, pairs)
