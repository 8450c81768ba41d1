"""The Triton kernels for tens of tokens, interpreted on CPU, against the steps one by one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import Prologue, TernaryWeight, pack, ternary_linear
from fabric_kernels.ternary_matmul import triton

from tests.kernels.test_triton_kernel import abstract_weight, lowered, shape

L = 3
# (tokens, outputs of each matrix, K): a tile of tokens that isn't full, one that is, several tiles
# of bytes, outputs that are no whole tile.
SHAPES = [
    (3, (70, 9), 132),
    (16, (64,), 512),
    (33, (130, 5, 64), 100),
    (64, (20,), 1032),
]


def problem(case: Any, dtype: str) -> dict[str, Any]:
    m, outputs, k = case
    rng = np.random.default_rng(m + k)

    def floats(*dims: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(dims), dtype)

    codes = [rng.integers(-1, 2, (L, n, k)).astype(np.int8) for n in outputs]
    scales = [rng.uniform(0.5, 2, L).astype(np.float32) for _ in outputs]
    weights = [
        TernaryWeight(pack(jnp.asarray(one), "ternary2"), jnp.asarray(scale), jnp.int32(1), k)
        for one, scale in zip(codes, scales, strict=True)
    ]
    return {
        "x": floats(m, k),
        "gate": floats(m, k),
        "gain": 1 + 0.1 * floats(L, k),
        "residual": floats(m, outputs[0]),
        "weights": weights,
        "codes": [one[1] for one in codes],
        "scales": [scale[1] for scale in scales],
    }


# Layers of bitnet-1b, bitnet-2b-4t and bitnet-13b.
DEVICE_SHAPES = [
    (32, (2048, 2048, 2048), 2048),
    (32, (2048,), 3584),
    (8, (2560, 640, 640), 2560),
    (8, (2560,), 6912),
    (64, (13824, 13824), 5120),
    (64, (5120,), 13824),
]


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_and_scales_are_exact(case: Any, dtype: str) -> None:
    check_exact(case, dtype)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("case", DEVICE_SHAPES, ids=str)
def test_sums_and_scales_of_large_layers_are_exact(case: Any) -> None:
    check_exact(case, "bfloat16")


def check_exact(case: Any, dtype: str) -> None:
    """Quantiser, sums and scales of numpy, in its own integers; a residual added last."""
    given = problem(case, dtype)
    residual = given["residual"] if len(case[1]) == 1 else None
    found = jax.jit(
        lambda x: ternary_linear(
            x,
            given["weights"],
            prologue=Prologue(),
            residual=residual,
            implementation="triton",
        )
    )(given["x"])
    x = np.asarray(given["x"], np.float32)
    largest = np.maximum(np.abs(x).max(axis=1, keepdims=True), np.float32(1e-5))
    act = (np.float32(1) / largest) * np.float32(127)
    rounded = np.clip(np.rint(x * act), -128, 127).astype(np.int64)
    for y, codes, scale in zip(found, given["codes"], given["scales"], strict=True):
        # Whole numbers below 2^53: exact in float64, whose product is faster.
        sums = (rounded.astype(np.float64) @ codes.T.astype(np.float64)).astype(np.float32)
        expected = jnp.asarray(sums * ((np.float32(1) / act) * scale)).astype(dtype)
        if residual is not None:
            expected = residual + expected
        assert y.dtype == dtype
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "relu2", None])
def test_equals_the_steps_one_by_one(case: Any, activation: Any) -> None:
    given = problem(case, "float32")
    gate = None if activation is None else given["gate"]
    before = Prologue(gate=gate, activation=activation, gain=given["gain"], eps=1e-5)
    found, expected = (
        ternary_linear(given["x"], given["weights"], prologue=before, implementation=name)
        for name in ("triton", "xla")
    )
    for ours, theirs in zip(found, expected, strict=True):
        # One code of a token at a tie, times a scale of at most two.
        step = 2 * float(jnp.max(jnp.abs(theirs))) / 127
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=step)
        error = np.abs(np.asarray(ours) - np.asarray(theirs))
        assert np.mean(error > 1e-4 * np.abs(theirs).max()) < 0.05


def test_what_is_not_a_number_stays_in_its_row() -> None:
    given = problem((5, (40,), 64), "float32")
    x = given["x"].at[2, 7].set(jnp.nan)
    before = Prologue(gain=given["gain"], eps=1e-5)
    (y,) = ternary_linear(x, given["weights"], prologue=before, implementation="triton")
    np.testing.assert_array_equal(np.any(np.isnan(y), axis=1), np.arange(5) == 2)
    assert np.all(np.isnan(y[2]))


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_lowers_to_two_launches_without_a_copy_of_the_stack(platform: str) -> None:
    weights = tuple(abstract_weight(n, 512, "ternary2") for n in (256, 68))
    x, gain = shape((32, 512), jnp.bfloat16), shape((3, 512), jnp.bfloat16)

    def run(x: jax.Array, weights: Any, gain: jax.Array) -> Any:
        return triton.linear_after(x, weights, Prologue(gain=gain, eps=1e-5))

    text = lowered(run, x, weights, gain, platform=platform)
    # Where nothing rounds as exactly the codes are XLA's.
    assert text.count("xla.gpu.triton") == (2 if platform == "cuda" else 1)
    assert not [line for line in text.splitlines() if "slice" in line and "ui8" in line]
