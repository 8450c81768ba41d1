"""Products with packed matrices against numpy in int64 and float64."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import (
    pack_ternary2,
    select_implementation,
    ternary_matmul,
    ternary_matmul_transposed,
)
from jax.test_util import check_grads

# Beyond any scratch limit of a float copy (17 MB); rows and columns divide nothing.
LARGE = (2100, 2049)
SHAPES = [(1, 1), (3, 5), (7, 64), (129, 255), (64, 1023)]
LEADING = [(), (0,), (1,), (8,), (129,), (2, 3), (1, 1), (2, 0, 3)]
# Every leading shape with one odd matrix, every matrix with one and with several rows.
CASES = [
    *((9, 66, leading) for leading in LEADING),
    *((n, k, leading) for n, k in SHAPES for leading in ((), (5,))),
]


def matrix(n: int, k: int, seed: int = 0) -> tuple[np.ndarray, jax.Array]:
    codes = np.random.default_rng(seed).integers(-1, 2, (n, k)).astype(np.int8)
    return codes, pack_ternary2(jnp.asarray(codes))


def int8_input(shape: tuple[int, ...], seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)


def float_input(shape: tuple[int, ...], seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_close(found: jax.Array, exact: np.ndarray, terms: int) -> None:
    """Within what summing ``terms`` values of order 1 in float32 may lose."""
    bound = 4e-7 * np.sqrt(terms) * max(1.0, float(np.max(np.abs(exact), initial=0)))
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=0, atol=bound)


@pytest.mark.parametrize(("n", "k", "leading"), CASES)
def test_integer_product_is_exact(n: int, k: int, leading: tuple[int, ...]) -> None:
    codes, packed = matrix(n, k)
    x = int8_input((*leading, k))
    y = ternary_matmul(jnp.asarray(x), packed)
    assert y.dtype == jnp.int32
    np.testing.assert_array_equal(y, x.astype(np.int64) @ codes.T.astype(np.int64))


@pytest.mark.parametrize("rows", [1, 2], ids=["one-row", "two-rows"])
@pytest.mark.parametrize("k", [131072, 132103, 132104, 150001])
def test_integer_product_is_exact_at_the_largest_sums(k: int, rows: int) -> None:
    """All products of one sign: sums reach 128·K, past 2^24 where float32 counts no further."""
    codes = np.stack([np.ones(k), -np.ones(k), np.ones(k)]).astype(np.int8)
    codes[2, 0] = 0
    x = np.full((rows, k), -128, np.int8)
    x[:, 1] = 127
    y = ternary_matmul(jnp.asarray(x), pack_ternary2(jnp.asarray(codes)))
    np.testing.assert_array_equal(y, x.astype(np.int64) @ codes.T.astype(np.int64))


@pytest.mark.parametrize(("n", "k", "leading"), CASES)
def test_float_product(n: int, k: int, leading: tuple[int, ...]) -> None:
    codes, packed = matrix(n, k)
    x = float_input((*leading, k))
    y = ternary_matmul(jnp.asarray(x), packed)
    assert y.dtype == jnp.float32
    assert_close(y, x.astype(np.float64) @ codes.T, k)


@pytest.mark.parametrize(("n", "k", "leading"), CASES)
def test_transposed_product(n: int, k: int, leading: tuple[int, ...]) -> None:
    codes, packed = matrix(n, k)
    g = float_input((*leading, n))
    y = ternary_matmul_transposed(jnp.asarray(g), packed, k)
    assert y.dtype == jnp.float32
    assert_close(y, g.astype(np.float64) @ codes, n)


@pytest.mark.parametrize("leading", [(), (3,), (2, 2)], ids=str)
def test_a_matrix_too_large_for_one_float_copy(leading: tuple[int, ...]) -> None:
    n, k = LARGE
    codes, packed = matrix(n, k)
    x, g = float_input((*leading, k)), float_input((*leading, n))
    assert_close(ternary_matmul(jnp.asarray(x), packed), x.astype(np.float64) @ codes.T, k)
    dx = ternary_matmul_transposed(jnp.asarray(g), packed, k)
    assert_close(dx, g.astype(np.float64) @ codes, n)
    x8 = int8_input((*leading, k))
    np.testing.assert_array_equal(
        ternary_matmul(jnp.asarray(x8), packed), x8.astype(np.int64) @ codes.T.astype(np.int64)
    )


@pytest.mark.parametrize("rows", [1, 16], ids=lambda rows: f"m{rows}")
@pytest.mark.parametrize("product", ["int8", "float", "transposed"])
def test_scratch_of_a_large_matrix_is_bounded(product: str, rows: int) -> None:
    """Integer products may unpack to a byte a weight; float ones never hold a whole float copy."""
    n, k = LARGE
    packed = jax.ShapeDtypeStruct((n, -(-k // 4)), jnp.uint8)
    calls: dict[str, tuple[Callable[[Any, Any], jax.Array], jax.ShapeDtypeStruct]] = {
        "int8": (ternary_matmul, jax.ShapeDtypeStruct((rows, k), jnp.int8)),
        "float": (ternary_matmul, jax.ShapeDtypeStruct((rows, k), jnp.float32)),
        "transposed": (
            lambda g, w: ternary_matmul_transposed(g, w, k),
            jax.ShapeDtypeStruct((rows, n), jnp.float32),
        ),
    }
    function, x = calls[product]
    memory = jax.jit(function).lower(x, packed).compile().memory_analysis()
    bytes_a_weight = memory.temp_size_in_bytes / (n * k)
    assert bytes_a_weight < 1.25


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_its_dtype(dtype: str) -> None:
    codes, packed = matrix(65, 300)
    x = jnp.asarray(float_input((6, 300)), dtype)
    y = ternary_matmul(x, packed)
    assert y.dtype == dtype
    exact = np.asarray(x, np.float64) @ codes.T
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=1e-2, atol=5e-2)


def test_half_precision_sums_tiles_in_float32() -> None:
    """Sums of whole numbers over many tiles: one rounding, at the end."""
    n, k = 16384, 1030
    codes, packed = matrix(n, k)
    g = jnp.ones((2, n), jnp.bfloat16)
    dx = ternary_matmul_transposed(g, packed, k)
    assert dx.dtype == jnp.bfloat16
    exact = np.ones((2, n)) @ codes
    rounded = np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float64)
    np.testing.assert_allclose(np.asarray(dx, np.float64), rounded, rtol=2**-8, atol=0)


def test_gradients_match_finite_differences_to_second_order() -> None:
    _, packed = matrix(11, 18)
    x, g = jnp.asarray(float_input((3, 18))), jnp.asarray(float_input((3, 11)))
    check_grads(lambda x: jnp.sin(ternary_matmul(x, packed)), (x,), 2, ["rev"], atol=2e-2)
    transposed = lambda g: jnp.sin(ternary_matmul_transposed(g, packed, 18))  # noqa: E731
    check_grads(transposed, (g,), 2, ["rev"], atol=2e-2)


def test_gradient_is_the_other_product() -> None:
    codes, packed = matrix(11, 18)
    x, g = float_input((3, 18)), float_input((3, 11))
    _, pull = jax.vjp(lambda x: ternary_matmul(x, packed), jnp.asarray(x))
    assert_close(pull(jnp.asarray(g))[0], g.astype(np.float64) @ codes, 11)
    _, pull = jax.vjp(lambda g: ternary_matmul_transposed(g, packed, 18), jnp.asarray(g))
    assert_close(pull(jnp.asarray(x))[0], x.astype(np.float64) @ codes.T, 18)


def test_hessian_of_half_the_squared_norm_is_the_gram_matrix() -> None:
    codes, packed = matrix(6, 9)
    energy = lambda x: 0.5 * jnp.sum(jnp.square(ternary_matmul(x, packed)))  # noqa: E731
    hessian = jax.jacrev(jax.grad(energy))(jnp.asarray(float_input((9,))))
    np.testing.assert_allclose(hessian, codes.T.astype(int) @ codes, atol=1e-5)


def test_vmap_over_inputs_and_over_matrices() -> None:
    codes = np.random.default_rng(3).integers(-1, 2, (4, 7, 10)).astype(np.int8)
    packed = pack_ternary2(jnp.asarray(codes))
    x = int8_input((4, 5, 10))
    y = jax.vmap(ternary_matmul)(jnp.asarray(x), packed)
    np.testing.assert_array_equal(y, np.einsum("lmk,lnk->lmn", x.astype(int), codes.astype(int)))
    shared = jax.vmap(ternary_matmul, in_axes=(0, None))(jnp.asarray(x), packed[0])
    np.testing.assert_array_equal(shared, x.astype(int) @ codes[0].T.astype(int))


def test_gradient_through_a_scan_over_a_stack() -> None:
    codes = np.random.default_rng(4).integers(-1, 2, (5, 8, 8)).astype(np.int8)
    packed = pack_ternary2(jnp.asarray(codes))
    x, g = float_input((3, 8)), float_input((3, 8))

    @jax.jit
    def run(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, w: (ternary_matmul(h, w), None), x, packed)[0]

    y, pull = jax.vjp(run, jnp.asarray(x))
    forward = np.linalg.multi_dot([x.astype(np.float64), *(c.T for c in codes.astype(np.float64))])
    backward = np.linalg.multi_dot([g.astype(np.float64), *codes[::-1].astype(np.float64)])
    np.testing.assert_allclose(y, forward, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(pull(jnp.asarray(g))[0], backward, rtol=1e-5, atol=1e-3)


def test_jit_gives_the_same_integers() -> None:
    codes, packed = matrix(33, 130)
    for shape in ((130,), (1, 130), (17, 130)):
        x = int8_input(shape)
        y = jax.jit(ternary_matmul)(jnp.asarray(x), packed)
        np.testing.assert_array_equal(y, x.astype(np.int64) @ codes.T.astype(np.int64))


def test_the_named_implementation_runs() -> None:
    _, packed = matrix(5, 8)
    x = jnp.asarray(int8_input((2, 8)))
    assert select_implementation("xla") == "xla"
    named = ternary_matmul(x, packed, implementation="xla")
    np.testing.assert_array_equal(named, ternary_matmul(x, packed))


@pytest.mark.parametrize("name", ["cuda", "", "XLA"])
def test_an_unknown_implementation_raises(name: str) -> None:
    _, packed = matrix(5, 8)
    unknown = cast(Any, name)
    with pytest.raises(ValueError, match=f"has the implementations xla.*found '{name}'"):
        select_implementation(unknown)
    with pytest.raises(ValueError, match="has the implementations"):
        ternary_matmul(jnp.zeros((2, 8)), packed, implementation=unknown)
    with pytest.raises(ValueError, match="has the implementations"):
        ternary_matmul_transposed(jnp.zeros((2, 5)), packed, 8, implementation=unknown)


@pytest.mark.parametrize(
    ("x", "packed", "error", "message"),
    [
        pytest.param(
            jnp.zeros((2, 8), jnp.int32),
            jnp.zeros((5, 2), jnp.uint8),
            TypeError,
            "takes int8 codes or floats, found int32",
            id="int32-input",
        ),
        pytest.param(
            jnp.zeros((2, 8)),
            jnp.zeros((5, 2), jnp.int8),
            TypeError,
            "packed ternary weights are uint8, found int8",
            id="int8-matrix",
        ),
        pytest.param(
            jnp.zeros((2, 9)),
            jnp.zeros((5, 2), jnp.uint8),
            ValueError,
            r"for 9 inputs have shape \[N, 3\], found \[5, 2\]",
            id="wrong-width",
        ),
        pytest.param(
            jnp.zeros((2, 8)),
            jnp.zeros((3, 5, 2), jnp.uint8),
            ValueError,
            r"found \[3, 5, 2\]",
            id="stack",
        ),
    ],
)
def test_wrong_arguments_of_the_product(
    x: jax.Array, packed: jax.Array, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ternary_matmul(x, packed)


def test_wrong_arguments_of_the_transposed_product() -> None:
    _, packed = matrix(5, 8)
    with pytest.raises(TypeError, match="takes floats, found int8"):
        ternary_matmul_transposed(jnp.zeros((2, 5), jnp.int8), packed, 8)
    with pytest.raises(ValueError, match="must have the 5 outputs of the matrix, found 4"):
        ternary_matmul_transposed(jnp.zeros((2, 4)), packed, 8)
    with pytest.raises(ValueError, match="for 9 inputs"):
        ternary_matmul_transposed(jnp.zeros((2, 5)), packed, 9)
