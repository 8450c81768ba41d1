"""All implementations round as float32 does in numpy: codes, scales and outputs, bit for bit."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import Packing, TernaryWeight, absmax_quantize, pack, ternary_linear
from fabric_kernels.ternary_matmul import Implementation, mosaic_tpu, triton
from fabric_kernels.ternary_matmul.mosaic_tpu import Target
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from tests.kernels.conftest import need_cpu_kernels

WIDTH = 48
LARGEST = 2.0**126
"""Of what is larger the reciprocal is denormal, which XLA flushes to zero."""
Linear = Callable[[jax.Array, Sequence[TernaryWeight]], Sequence[jax.Array]]


def every_linear() -> dict[str, Linear]:
    """Each implementation that runs here, Pallas' interpreted."""
    need_cpu_kernels()
    return {
        "xla": partial(ternary_linear, implementation="xla"),
        "cpu": partial(ternary_linear, implementation="cpu"),
        "triton": triton.linear,
        "mosaic_tpu": partial(mosaic_tpu.linear, target=Target(int8=True, interpret=True)),
    }


def numpy_codes(x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Codes as floats, and what divides them: section by section the rounding of the rule."""
    largest = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-5))
    scale = (np.float32(1) / largest * np.float32(127)).astype(np.float32)
    return np.clip(np.rint(x * scale), -128, 127).astype(np.float32), scale


def numpy_linear(
    x: NDArray[np.float32], codes: NDArray[np.int8], scale: float
) -> NDArray[np.float32]:
    own, by_token = numpy_codes(x)
    sums = (own.astype(np.int64) @ codes.T.astype(np.int64)).astype(np.float32)
    return (sums * (np.float32(1) / by_token * np.float32(scale))).astype(np.float32)


def weight_of(codes: NDArray[np.int8], packing: Packing, scale: float) -> TernaryWeight:
    packed = pack(jnp.asarray(codes), packing)
    return TernaryWeight(packed, jnp.float32(scale), None, codes.shape[1], packing)


@st.composite
def adversarial_rows(draw: st.DrawFn) -> NDArray[np.float32]:
    """Rows [M, 48]: any floats, ties and their neighbours, denormals, huge and tiny rows."""
    rows = draw(st.sampled_from([1, 3, 6]))
    floats = st.floats(-LARGEST, LARGEST, width=32)
    ties = st.integers(-253, 253).map(lambda n: n / 2)
    near = st.builds(lambda n, to: float(np.nextafter(np.float32(n), np.float32(to))), ties, floats)
    denormal = st.floats(-(2.0**-126), 2.0**-126, width=32)
    element = draw(st.sampled_from([floats, ties, near, denormal, ties | near | denormal]))
    x = draw(hnp.arrays(np.float32, (rows, WIDTH), elements=element))
    if draw(st.booleans()):
        x[:, 0] = 127
    power = draw(st.integers(-140, 118))
    with np.errstate(over="ignore", under="ignore"):
        scaled = np.ldexp(x, power)
    return np.where(np.abs(scaled) <= LARGEST, scaled, x)


@given(adversarial_rows())
@settings(max_examples=40, deadline=None)
def test_codes_and_scales(x: NDArray[np.float32]) -> None:
    """An identity matrix shows every code, times the inverse of its scale."""
    codes, scale = numpy_codes(x)
    found, by_token = jax.jit(absmax_quantize)(x)
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_array_equal(by_token, scale)
    weight = weight_of(np.eye(WIDTH, dtype=np.int8), "ternary2", 1.0)
    expected = codes * (np.float32(1) / scale)
    for name in ("xla", "cpu"):
        (y,) = every_linear()[name](jnp.asarray(x), (weight,))
        np.testing.assert_array_equal(y, expected, name)


@pytest.mark.parametrize(
    ("rows", "packing", "dtype"),
    [
        (1, "ternary2", "float32"),
        (3, "ternary1.6", "float32"),
        (20, "ternary2", "bfloat16"),
        (3, "ternary2", "float16"),
    ],
)
def test_every_implementation_rounds_as_numpy(rows: int, packing: Packing, dtype: str) -> None:
    random = np.random.default_rng(rows)
    spread = np.exp(random.uniform(-9, 9, (rows, 1)))
    x = jnp.asarray(random.standard_normal((rows, 130)) * spread, dtype)
    codes = random.integers(-1, 2, (67, 130)).astype(np.int8)
    weight = weight_of(codes, packing, 0.0163)
    expected = jnp.asarray(numpy_linear(np.asarray(x, np.float32), codes, 0.0163)).astype(dtype)
    for name, linear in every_linear().items():
        (y,) = jax.jit(linear)(x, (weight,))
        assert y.dtype == dtype
        np.testing.assert_array_equal(np.asarray(y), np.asarray(expected), name)


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_an_addition_is_not_contracted_with_the_product(
    rows: int, implementation: Implementation
) -> None:
    """A fused multiply-add rounds once where the rule rounds twice: every fourth sum differs."""
    random = np.random.default_rng(rows)
    x, residual = (random.standard_normal((rows, n)).astype(np.float32) for n in (WIDTH, 4 * WIDTH))
    codes = random.integers(-1, 2, (4 * WIDTH, WIDTH)).astype(np.int8)
    weight = weight_of(codes, "ternary2", 0.0163)

    @jax.jit
    def layer(x: jax.Array, residual: jax.Array, scale: jax.Array) -> jax.Array:
        own = TernaryWeight(weight.packed, scale, None, WIDTH)
        return ternary_linear(x, (own,), residual=residual, implementation=implementation)[0]

    # The suite's own flags leave out what this is about.
    flags = {"xla_backend_optimization_level": "3", "xla_llvm_disable_expensive_passes": False}
    compiled = layer.lower(x, residual, weight.scale).compile(compiler_options=flags)
    found = compiled(x, residual, weight.scale)
    np.testing.assert_array_equal(found, residual + numpy_linear(x, codes, 0.0163))
