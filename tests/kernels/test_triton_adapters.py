"""Groups of linears with adapters in Pallas-Triton kernels, interpreted where there is no GPU."""

from functools import partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import LowRank, ternary_linear
from fabric_kernels.ternary_matmul import mosaic_gpu, triton, triton_group, triton_layout

from tests.kernels.linear_problems import (
    Problem,
    expected_gradients,
    expected_outputs,
    quantize,
)
from tests.kernels.test_ternary_linear import BFLOAT16, FLOAT32, assert_within
from tests.kernels.test_triton_kernel import ON_GPU, abstract_weight, lowered, shape

Run = Any


def compiled(function: Run, *args: Any) -> Any:
    """Results of a program that isn't optimised: interpreted kernels compile for long."""
    options = {} if ON_GPU else {"xla_backend_optimization_level": "0"}
    return jax.jit(function).lower(*args).compile(compiler_options=options)(*args)


def assert_right(problem: Problem, outputs: Any, dx: Any, pairs: Any) -> None:
    relative = FLOAT32 if problem.dtype == "float32" else BFLOAT16
    narrow = max(relative, FLOAT32 if problem.adapter_dtype == "float32" else BFLOAT16)
    for found, expected, n in zip(outputs, expected_outputs(problem), problem.n, strict=True):
        assert found.dtype == problem.dtype
        assert found.shape == (*problem.leading, n)
        assert_within(found, expected, relative)
    expected_dx, expected_pairs = expected_gradients(problem)
    assert dx.dtype == problem.dtype
    assert dx.shape == problem.x.shape
    assert_within(dx, expected_dx, relative)
    for found, expected in zip(pairs, expected_pairs, strict=True):
        assert (found is None) == (expected is None)
        for part, value in zip(found or (), expected or (), strict=True):
            assert_within(part, value, narrow)


def few_tokens_and_several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of N, and of the tokens that a gradient of A or B is a sum over."""
    kind = triton_layout.group_kernels()[1].SumTile
    monkeypatch.setattr(triton_layout, "LEAST_STEPS", 1)
    monkeypatch.setattr(triton_group, "sum_tile", lambda *_: kind(tokens=16, most=32))


def many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow products of a group in one, beside the quantiser."""
    monkeypatch.setattr(triton_group, "MANY_TOKENS", 1)


def a_launch_for_each_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_layout, "MULTIPROCESSORS", 1)


def nothing(_: pytest.MonkeyPatch) -> None:
    """As it is."""


@pytest.mark.parametrize(
    ("problem", "change"),
    [
        (
            Problem(n=(12, 30), k=75, leading=(20,), ranks=(None, 17), dtype="bfloat16"),
            nothing,
        ),
        (
            Problem(n=(150, 9), k=70, leading=(4, 10), ranks=(3, 5), packing="ternary1.6"),
            few_tokens_and_several_parts,
        ),
        (
            Problem(n=(12, 30), k=75, leading=(20,), ranks=(2, 17), dtype="bfloat16"),
            many_tokens,
        ),
        (
            Problem(
                n=(9, 14),
                k=64,
                leading=(32,),
                ranks=(16, None),
                packing="ternary1.6",
                dtype="bfloat16",
            ),
            many_tokens,
        ),
        (
            Problem(
                n=(20, 21),
                k=48,
                leading=(18,),
                ranks=(3, 130),
                dtype="bfloat16",
                adapter_dtype="bfloat16",
            ),
            a_launch_for_each_matrix,
        ),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_outputs_and_gradients(
    problem: Problem, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch)

    def run(x: jax.Array, adapters: Any, weights: Any, gradients: Any) -> Any:
        call = partial(ternary_linear, weights=weights, implementation="triton")
        outputs, pull = jax.vjp(lambda x, adapters: call(x, adapters=adapters), x, adapters)
        return outputs, *pull(gradients)

    outputs, dx, found = compiled(
        run, problem.x, problem.adapters, problem.weights, problem.gradients
    )
    for adapter, gradient in zip(problem.adapters, found, strict=True):
        if adapter is not None:
            assert (gradient.a.dtype, gradient.b.dtype) == (adapter.a.dtype, adapter.b.dtype)
    pairs = [None if one is None else (one.a, one.b) for one in found]
    assert_right(problem, outputs, dx, pairs)


def test_gradients_go_to_what_is_kept() -> None:
    problem = Problem(n=(9,), k=20, leading=(3,), ranks=(2,))
    kept = 0.5 * problem.x

    def run(x: jax.Array, kept: jax.Array, adapters: Any) -> Any:
        call = partial(ternary_linear, weights=problem.weights, implementation="triton")
        outputs, pull = jax.vjp(lambda *a: call(a[0], adapters=a[2], kept=a[1]), x, kept, adapters)
        return outputs, *pull(problem.gradients)

    outputs, dx, d_kept, (found,) = compiled(run, problem.x, kept, problem.adapters)
    assert not np.any(np.asarray(dx))
    of_kept, pairs = expected_gradients(problem)
    assert_within(outputs[0], expected_outputs(problem)[0], FLOAT32)
    assert_within(d_kept, of_kept, FLOAT32)
    assert pairs[0] is not None
    # A's is a sum over what is kept, B's over the narrow product of x itself.
    assert_within(2 * found.a, pairs[0][0], FLOAT32)
    assert_within(found.b, pairs[0][1], FLOAT32)


@pytest.mark.parametrize("in_planes", [False, True])
def test_codes_are_those_of_the_quantiser(in_planes: bool) -> None:
    """Bit for bit: ties, rows of many magnitudes, zeros; and zeros past the row."""
    problem = Problem(n=(5, 6), k=301, leading=(20,), ranks=(None, None))
    x = problem.x.at[0].set(np.linspace(-127, 127, 301).round() / 2).at[1].set(0)
    expected, scale = quantize(x)
    k = np.arange(320)
    if in_planes:
        k = k // 64 * 64 + k % 4 * 16 + k // 4 % 16
        run = partial(triton_group.quantized_planes, rows=24, columns=320)
        codes, sums, factors = compiled(run, x, problem.weights)
        np.testing.assert_array_equal(sums[:20], np.sum(np.asarray(expected, np.int64), axis=1))
        padded = jnp.asarray(np.pad(expected, ((0, 0), (0, 19))))
        np.testing.assert_array_equal(triton_group.turned(padded), codes[:20])
    else:
        run = partial(triton_group.quantized_rows, adapters=(None, None), rows=24, columns=320)
        codes, factors, _ = compiled(run, x, problem.weights)
    assert codes.shape == (24, 320)
    np.testing.assert_array_equal(codes[:20, k[:301]], expected)
    assert not np.any(np.asarray(codes)[:20, k[301:]])
    factor = np.float32(1) / scale[:, 0].astype(np.float32)
    for found, of_matrix in zip(factors, problem.scales, strict=True):
        np.testing.assert_array_equal(found[:20], factor * np.float32(of_matrix))


def test_what_is_not_a_number_stays_visible() -> None:
    problem = Problem(n=(5,), k=40, leading=(20,), ranks=(None,))
    x = problem.x.at[3, 7].set(np.nan).at[5, 0].set(np.inf)
    (factor,) = compiled(
        lambda x, weights: triton_group.quantized_rows(x, weights, (None,), 24, 64)[1],
        x,
        problem.weights,
    )
    np.testing.assert_array_equal(np.isfinite(factor[:20]), ~np.isin(np.arange(20), (3, 5)))


@pytest.mark.skipif(ON_GPU, reason="interpreted; on a GPU the layers' own tests run it")
def test_mosaic_gpu_with_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products interpreted, and the forms of the backward product that are not its own."""
    # Both supported versions of jax have it, not yet where users look.
    interpret = import_module("jax._src.pallas.mosaic_gpu.interpret.params").InterpretGPUParams
    problem = Problem(n=(64,), k=256, leading=(2, 32), ranks=(3,), dtype="bfloat16")
    given = problem.x, problem.weights, problem.adapters
    # Not compiled as one: an interpreted Mosaic kernel calls back, and may then wait for itself.
    outputs, narrow = mosaic_gpu.linear_with_adapters(*given, interpret=interpret())
    products = problem.x, problem.gradients, *given[1:], narrow
    monkeypatch.setattr(mosaic_gpu, "LEAST_TOKENS", 64)
    dx, pairs = mosaic_gpu.transposed_with_adapters(*products, interpret=interpret())
    assert_right(problem, outputs, dx, pairs)
    monkeypatch.setattr(mosaic_gpu, "LEAST_TOKENS", 65)
    for tokens in (1, 1024):
        monkeypatch.setattr(mosaic_gpu, "UNPACKED_TOKENS", tokens)
        dx, pairs = compiled(partial(mosaic_gpu.transposed_with_adapters), *products)
        assert_right(problem, outputs, dx, pairs)


@pytest.mark.parametrize("rows", [64, 8192])
@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_launches(platform: str, rows: int) -> None:
    """Few, and none that reads a copy of a stack."""
    if ON_GPU and platform != jax.devices()[0].platform.replace("gpu", "cuda"):
        pytest.skip("on a machine with a GPU JAX lowers for that one alone")
    weights = tuple(abstract_weight(n, 512, "ternary2") for n in (768, 256))
    x = shape((rows, 512), jnp.bfloat16)
    gradients = tuple(shape((rows, w.n), jnp.bfloat16) for w in weights)
    adapters = tuple(
        LowRank(shape((16, 512), jnp.float32), shape((16, w.n), jnp.float32), 2.0) for w in weights
    )
    narrow = (shape((rows, 32), jnp.bfloat16),)
    forward = lowered(triton.linear_with_adapters, x, weights, adapters, platform=platform)
    backward = lowered(
        triton.transposed_with_adapters, x, gradients, weights, adapters, narrow, platform=platform
    )
    assert forward.count("xla.gpu.triton") == (2 if platform == "cuda" else 1)
    assert backward.count("xla.gpu.triton") == (2 if rows == 64 else 4)
    for text in (forward, backward):
        assert not [line for line in text.splitlines() if "slice" in line and "ui8" in line]
