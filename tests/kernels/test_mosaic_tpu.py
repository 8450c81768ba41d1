"""The TPU kernels in Pallas' interpreter against numpy, and compiled where libtpu is installed."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import Packing, TernaryWeight, pack, packed_width
from fabric_kernels.ternary_matmul import compile_tpu, mosaic_tpu, xla
from fabric_kernels.ternary_matmul.mosaic_tpu import Target
from jax import lax

from tests.kernels.linear_problems import Problem, expected_gradients, expected_outputs, rows_of

INT8 = Target(int8=True, interpret=True)
BFLOAT16 = Target(int8=False, interpret=True)
# Odd sizes; several tiles of each axis; bytes and columns that end within a block.
SIZES = [(1, 1, 1), (3, 33, 66), (5, 130, 2053), (300, 700, 100), (2, 65, 4100)]
PACKINGS: tuple[Packing, ...] = ("ternary2", "ternary1.6")
# A sum of a few thousand float32 terms, in parts of the largest result.
FLOAT32 = 1e-6


def make(n: int, k: int, packing: Packing = "ternary2") -> tuple[np.ndarray, TernaryWeight]:
    codes = np.random.default_rng(n + k).integers(-1, 2, (n, k)).astype(np.int8)
    packed = pack(jnp.asarray(codes), packing)
    return codes, TernaryWeight(packed, jnp.float32(0.02), None, k, packing)


def normal(*shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(7).standard_normal(shape, np.float32)).astype(dtype)


def relative(found: jax.Array, exact: np.ndarray) -> float:
    """The largest error, in parts of the largest exact result."""
    return float(np.max(np.abs(np.asarray(found, np.float64) - exact)) / np.max(np.abs(exact)))


@pytest.mark.parametrize(
    ("size", "packing", "target"),
    [
        *((size, "ternary2", INT8) for size in SIZES),
        *((size, "ternary1.6", INT8) for size in SIZES[1:4]),
        *((SIZES[2], packing, BFLOAT16) for packing in PACKINGS),
    ],
    ids=str,
)
def test_integer_products_are_exact(
    size: tuple[int, int, int], packing: Packing, target: Target
) -> None:
    m, n, k = size
    codes, weight = make(n, k, packing)
    x = np.random.default_rng(1).integers(-128, 128, (m, k)).astype(np.int8)
    x[0] = -128
    found = mosaic_tpu.matmul(jnp.asarray(x), weight, target=target)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, x.astype(np.int64) @ codes.T.astype(np.int64))


@pytest.mark.parametrize(
    ("packing", "target"),
    [("ternary2", INT8), ("ternary2", BFLOAT16), ("ternary1.6", INT8), ("ternary1.6", BFLOAT16)],
    ids=str,
)
def test_largest_sums(packing: Packing, target: Target) -> None:
    """-128 by rows of one code: no sum is larger, in any block."""
    k = 9000
    codes = jnp.asarray([-1, 0, 1], jnp.int8)
    packed = pack(jnp.broadcast_to(codes[:, None], (3, k)), packing)
    weight = TernaryWeight(packed, jnp.float32(1), None, k, packing)
    found = mosaic_tpu.matmul(jnp.full((2, k), -128, jnp.int8), weight, target=target)
    np.testing.assert_array_equal(found, [[128 * k, 0, -128 * k]] * 2)


@pytest.mark.parametrize(
    ("size", "packing", "dtype"),
    [
        *((size, "ternary2", "float32") for size in SIZES),
        *((size, "ternary2", "bfloat16") for size in SIZES[2:4]),
        *((size, "ternary1.6", "float32") for size in SIZES[2:4]),
        (SIZES[1], "ternary1.6", "bfloat16"),
    ],
    ids=str,
)
def test_float_products(size: tuple[int, int, int], packing: Packing, dtype: str) -> None:
    m, n, k = size
    codes, weight = make(n, k, packing)
    bound = FLOAT32 if dtype == "float32" else 5e-3
    x, g = normal(m, k, dtype=dtype), normal(m, n, dtype=dtype)
    y = mosaic_tpu.matmul(x, weight, target=INT8)
    dx = mosaic_tpu.matmul_transposed(g, weight, target=INT8)
    assert (y.dtype, dx.dtype) == (x.dtype, g.dtype)
    assert relative(y, np.asarray(x, np.float64) @ codes.T) < bound
    assert relative(dx, np.asarray(g, np.float64) @ codes) < bound


def test_float16_and_leading_axes() -> None:
    codes, weight = make(20, 30)
    x = normal(2, 3, 30, dtype="float16")
    y = mosaic_tpu.linear(x, (weight,), target=INT8)[0]
    dx = mosaic_tpu.linear_transposed((y,), (weight,), target=INT8)
    assert (y.shape, y.dtype, dx.shape, dx.dtype) == ((2, 3, 20), x.dtype, x.shape, x.dtype)
    np.testing.assert_array_equal(y, xla.linear(x, (weight,))[0])
    assert relative(dx, np.asarray(y, np.float64) @ codes * 0.02) < 5e-3


@pytest.mark.parametrize("packing", PACKINGS)
def test_grouped_linears(packing: Packing) -> None:
    problem = Problem(n=(40, 130), k=529, leading=(3, 5), ranks=(None,) * 2, packing=packing)
    found = mosaic_tpu.linear(problem.x, problem.weights, target=INT8)
    of_xla = xla.linear(problem.x, problem.weights)
    for y, other, exact in zip(found, of_xla, expected_outputs(problem), strict=True):
        np.testing.assert_allclose(y, other, rtol=3e-7)
        assert relative(y.reshape(exact.value.shape), exact.value) < FLOAT32
    dx = mosaic_tpu.linear_transposed(problem.gradients, problem.weights, target=INT8)
    error = np.abs(rows_of(dx) - expected_gradients(problem)[0].value)
    assert np.all(error <= FLOAT32 * expected_gradients(problem)[0].magnitude)


@pytest.mark.parametrize("packing", PACKINGS)
def test_stack_in_scan(packing: Packing) -> None:
    """A traced layer index reads the layer's bytes and scale."""
    layers, n, k = 3, 37, 75
    codes = np.random.default_rng(5).integers(-1, 2, (layers, n, k)).astype(np.int8)
    packed = pack(jnp.asarray(codes), packing)
    scales = jnp.asarray([0.5, -2.0, 3.0], jnp.float32)
    x, g = normal(4, k), normal(4, n)

    @jax.jit
    def run(packed: jax.Array, scales: jax.Array) -> tuple[jax.Array, jax.Array]:
        def step(_: None, layer: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
            weights = (TernaryWeight(packed, scales, layer, k, packing),)
            y = mosaic_tpu.linear(x, weights, target=INT8)[0]
            return None, (y, mosaic_tpu.linear_transposed((g,), weights, target=INT8))

        return lax.scan(step, None, jnp.arange(layers))[1]

    y, dx = run(packed, scales)
    for layer in range(layers):
        alone = TernaryWeight(packed[layer], scales[layer], None, k, packing)
        np.testing.assert_allclose(y[layer], xla.linear(x, (alone,))[0], rtol=3e-7)
        exact = np.asarray(g, np.float64) @ codes[layer] * float(scales[layer])
        assert relative(dx[layer], exact) < FLOAT32


def test_no_slice_of_the_stack() -> None:
    weight = TernaryWeight(
        jnp.zeros((4, 64, 32), jnp.uint8), jnp.ones((4,), jnp.float32), jnp.int32(1), 128
    )
    text = str(
        jax.make_jaxpr(lambda x: mosaic_tpu.linear(x, (weight,), target=INT8))(normal(2, 128))
    )
    assert "u8[64,32]" not in text
    assert "u8[1,64,32]" not in text


def test_no_rows() -> None:
    _, weight = make(5, 9)
    assert mosaic_tpu.linear(normal(0, 9), (weight,), target=INT8)[0].shape == (0, 5)
    assert mosaic_tpu.matmul_transposed(normal(0, 5), weight, target=INT8).shape == (0, 9)


@pytest.mark.parametrize("int8", [True, False], ids=["int8", "bfloat16"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_lowers_for_tpu(packing: Packing, int8: bool) -> None:
    """Mosaic takes the kernels, and the stack goes to them whole; no libtpu is asked."""
    target, layers, n, k = Target(int8=int8), 2, 192, 200

    def run(x: jax.Array, g: jax.Array, packed: jax.Array, layer: jax.Array) -> list[jax.Array]:
        weights = (TernaryWeight(packed, jnp.ones((layers,)), layer, k, packing),)
        y = mosaic_tpu.linear(x, weights, target=target)[0]
        dx = mosaic_tpu.linear_transposed((g,), weights, target=target)
        return [y, dx, mosaic_tpu.matmul(x, weights[0], target=target)]

    shapes = ((8, k), jnp.float32), ((8, n), jnp.bfloat16), ((), jnp.int32)
    x, g, layer = (jax.ShapeDtypeStruct(*shape) for shape in shapes)
    packed = jax.ShapeDtypeStruct((layers, n, packed_width(k, packing)), jnp.uint8)
    text = jax.jit(run).trace(x, g, packed, layer).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == (5 if packing == "ternary2" else 3)


def test_compiles_for_tpu() -> None:
    if not compile_tpu.available():
        pytest.skip("no libtpu")
    script = (
        "from fabric_kernels.ternary_matmul import compile_tpu as c\n"
        "place = c.describe('v5e')\n"
        "for call in ('linear', 'transposed'):\n"
        "    text = c.compile_call(call, 192, 200, 8, 'v5e', place).as_text()\n"
        "    assert 'tpu_custom_call' in text\n"
        "    assert not [l for l in text.splitlines() if 'u8[' in l and 'dynamic-slice' in l]\n"
    )
    # libtpu reads the environment once, and would stay loaded in the tests' process.
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=env, timeout=300)
