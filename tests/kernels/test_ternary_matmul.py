"""Products with packed matrices against numpy in int64 and float64."""

from collections.abc import Callable
from functools import partial
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
from fabric_kernels.ternary_matmul import Implementation
from jax.test_util import check_grads

from tests.kernels.conftest import need_cpu_kernels

# One compilation for each shape.
matmul = jax.jit(ternary_matmul, static_argnames="implementation")
transposed = jax.jit(ternary_matmul_transposed, static_argnames=("k", "implementation"))
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
def test_integer_product_is_exact(
    n: int, k: int, leading: tuple[int, ...], implementation: Implementation
) -> None:
    codes, packed = matrix(n, k)
    x = int8_input((*leading, k))
    y = matmul(jnp.asarray(x), packed, implementation=implementation)
    assert y.dtype == jnp.int32
    np.testing.assert_array_equal(y, x.astype(np.int64) @ codes.T.astype(np.int64))


@pytest.mark.parametrize("rows", [1, 2], ids=["one-row", "two-rows"])
@pytest.mark.parametrize("k", [131072, 132103, 132104, 150001])
def test_integer_product_is_exact_at_the_largest_sums(
    k: int, rows: int, implementation: Implementation
) -> None:
    """All products of one sign: sums reach 128·K, past 2^24 where float32 counts no further."""
    codes = np.stack([np.ones(k), -np.ones(k), np.ones(k)]).astype(np.int8)
    codes[2, 0] = 0
    x = np.full((rows, k), -128, np.int8)
    x[:, 1] = 127
    y = matmul(jnp.asarray(x), pack_ternary2(jnp.asarray(codes)), implementation=implementation)
    np.testing.assert_array_equal(y, x.astype(np.int64) @ codes.T.astype(np.int64))


@pytest.mark.parametrize(("n", "k", "leading"), CASES)
def test_float_product(
    n: int, k: int, leading: tuple[int, ...], implementation: Implementation
) -> None:
    codes, packed = matrix(n, k)
    x = float_input((*leading, k))
    y = matmul(jnp.asarray(x), packed, implementation=implementation)
    assert y.dtype == jnp.float32
    assert_close(y, x.astype(np.float64) @ codes.T, k)


@pytest.mark.parametrize(("n", "k", "leading"), CASES)
def test_transposed_product(
    n: int, k: int, leading: tuple[int, ...], implementation: Implementation
) -> None:
    codes, packed = matrix(n, k)
    g = float_input((*leading, n))
    y = transposed(jnp.asarray(g), packed, k, implementation=implementation)
    assert y.dtype == jnp.float32
    assert_close(y, g.astype(np.float64) @ codes, n)


@pytest.mark.parametrize("leading", [(), (3,), (2, 2)], ids=str)
def test_a_matrix_too_large_for_one_float_copy(
    leading: tuple[int, ...], implementation: Implementation
) -> None:
    n, k = LARGE
    codes, packed = matrix(n, k)
    x, g = float_input((*leading, k)), float_input((*leading, n))
    assert_close(
        matmul(jnp.asarray(x), packed, implementation=implementation),
        x.astype(np.float64) @ codes.T,
        k,
    )
    dx = transposed(jnp.asarray(g), packed, k, implementation=implementation)
    assert_close(dx, g.astype(np.float64) @ codes, n)
    x8 = int8_input((*leading, k))
    np.testing.assert_array_equal(
        matmul(jnp.asarray(x8), packed, implementation=implementation),
        x8.astype(np.int64) @ codes.T.astype(np.int64),
    )


@pytest.mark.parametrize("rows", [1, 16], ids=lambda rows: f"m{rows}")
@pytest.mark.parametrize("product", ["int8", "float", "transposed"])
def test_scratch_of_a_large_matrix_is_bounded(
    product: str, rows: int, implementation: Implementation
) -> None:
    """Integer products may unpack to a byte a weight; float ones never hold a whole float copy.

    The CPU kernels unpack in scratch of their own, a panel at a time.
    """
    n, k = LARGE
    packed = jax.ShapeDtypeStruct((n, -(-k // 4)), jnp.uint8)
    calls: dict[str, tuple[Callable[[Any, Any], jax.Array], jax.ShapeDtypeStruct]] = {
        "int8": (matmul, jax.ShapeDtypeStruct((rows, k), jnp.int8)),
        "float": (matmul, jax.ShapeDtypeStruct((rows, k), jnp.float32)),
        "transposed": (
            lambda g, w, **chosen: transposed(g, w, k, **chosen),
            jax.ShapeDtypeStruct((rows, n), jnp.float32),
        ),
    }
    function, x = calls[product]
    call = jax.jit(partial(function, implementation=implementation))
    memory = call.lower(x, packed).compile().memory_analysis()
    bytes_a_weight = memory.temp_size_in_bytes / (n * k)
    assert bytes_a_weight < (1.25 if implementation == "xla" else 0.05)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_its_dtype(dtype: str, implementation: Implementation) -> None:
    codes, packed = matrix(65, 300)
    x = jnp.asarray(float_input((6, 300)), dtype)
    y = matmul(x, packed, implementation=implementation)
    assert y.dtype == dtype
    exact = np.asarray(x, np.float64) @ codes.T
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=1e-2, atol=5e-2)


def test_half_precision_sums_tiles_in_float32(implementation: Implementation) -> None:
    """Sums of whole numbers over many tiles: one rounding, at the end."""
    n, k = 16384, 1030
    codes, packed = matrix(n, k)
    g = jnp.ones((2, n), jnp.bfloat16)
    dx = transposed(g, packed, k, implementation=implementation)
    assert dx.dtype == jnp.bfloat16
    exact = np.ones((2, n)) @ codes
    rounded = np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float64)
    np.testing.assert_allclose(np.asarray(dx, np.float64), rounded, rtol=2**-8, atol=0)


def test_gradients_match_finite_differences_to_second_order(implementation: Implementation) -> None:
    _, packed = matrix(11, 18)
    x, g = jnp.asarray(float_input((3, 18))), jnp.asarray(float_input((3, 11)))
    for function, operand in (
        (lambda x: matmul(x, packed, implementation=implementation), x),
        (lambda g: transposed(g, packed, 18, implementation=implementation), g),
    ):
        check_grads(lambda v, f=function: jnp.sin(f(v)), (operand,), 2, ["rev"], atol=2e-2)


def test_gradient_is_the_other_product(implementation: Implementation) -> None:
    codes, packed = matrix(11, 18)
    x, g = float_input((3, 18)), float_input((3, 11))
    _, pull = jax.vjp(lambda x: matmul(x, packed, implementation=implementation), jnp.asarray(x))
    assert_close(pull(jnp.asarray(g))[0], g.astype(np.float64) @ codes, 11)
    _, pull = jax.vjp(
        lambda g: transposed(g, packed, 18, implementation=implementation), jnp.asarray(g)
    )
    assert_close(pull(jnp.asarray(x))[0], x.astype(np.float64) @ codes.T, 18)


def test_hessian_of_half_the_squared_norm_is_the_gram_matrix(
    implementation: Implementation,
) -> None:
    codes, packed = matrix(6, 9)

    def energy(x: jax.Array) -> jax.Array:
        return 0.5 * jnp.sum(jnp.square(matmul(x, packed, implementation=implementation)))

    hessian = jax.jacrev(jax.grad(energy))(jnp.asarray(float_input((9,))))
    np.testing.assert_allclose(hessian, codes.T.astype(int) @ codes, atol=1e-5)


def test_vmap_over_inputs_and_over_matrices(implementation: Implementation) -> None:
    codes = np.random.default_rng(3).integers(-1, 2, (4, 7, 10)).astype(np.int8)
    packed = pack_ternary2(jnp.asarray(codes))
    x = int8_input((4, 5, 10))
    product = partial(matmul, implementation=implementation)
    y = jax.vmap(product)(jnp.asarray(x), packed)
    np.testing.assert_array_equal(y, np.einsum("lmk,lnk->lmn", x.astype(int), codes.astype(int)))
    shared = jax.vmap(product, in_axes=(0, None))(jnp.asarray(x), packed[0])
    np.testing.assert_array_equal(shared, x.astype(int) @ codes[0].T.astype(int))


def test_gradient_through_a_scan_over_a_stack(implementation: Implementation) -> None:
    codes = np.random.default_rng(4).integers(-1, 2, (5, 8, 8)).astype(np.int8)
    packed = pack_ternary2(jnp.asarray(codes))
    x, g = float_input((3, 8)), float_input((3, 8))

    @jax.jit
    def run(x: jax.Array) -> jax.Array:
        return jax.lax.scan(
            lambda h, w: (matmul(h, w, implementation=implementation), None), x, packed
        )[0]

    y, pull = jax.vjp(run, jnp.asarray(x))
    forward = np.linalg.multi_dot([x.astype(np.float64), *(c.T for c in codes.astype(np.float64))])
    backward = np.linalg.multi_dot([g.astype(np.float64), *codes[::-1].astype(np.float64)])
    np.testing.assert_allclose(y, forward, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(pull(jnp.asarray(g))[0], backward, rtol=1e-5, atol=1e-3)


def test_integers_are_the_same_without_jit(implementation: Implementation) -> None:
    codes, packed = matrix(33, 130)
    for shape in ((130,), (1, 130), (17, 130)):
        x = int8_input(shape)
        y = ternary_matmul(jnp.asarray(x), packed, implementation=implementation)
        np.testing.assert_array_equal(y, x.astype(np.int64) @ codes.T.astype(np.int64))


def test_the_named_implementation_runs(implementation: Implementation) -> None:
    """Its calls are in the program, and no others."""
    _, packed = matrix(5, 8)
    assert select_implementation(implementation) == implementation
    call = partial(ternary_matmul, implementation=implementation)
    program = str(jax.make_jaxpr(call)(int8_input((2, 8)), packed))
    assert ("fabric_ternary" in program) == (implementation == "cpu")
    assert ("dot_general" in program) == (implementation == "xla")


def test_the_best_implementation_is_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FABRIC_KERNELS_CPU", "0")
    assert select_implementation() == "xla"
    monkeypatch.delenv("FABRIC_KERNELS_CPU")
    need_cpu_kernels()
    assert select_implementation() == "cpu"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert select_implementation() == "xla"


def test_a_named_implementation_that_is_not_there_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    _, packed = matrix(5, 8)
    monkeypatch.setenv("FABRIC_KERNELS_CPU", "0")
    for call in (
        lambda: ternary_matmul(jnp.zeros((2, 8)), packed, implementation="cpu"),
        lambda: ternary_matmul_transposed(jnp.zeros((2, 5)), packed, 8, implementation="cpu"),
    ):
        with pytest.raises(RuntimeError, match="FABRIC_KERNELS_CPU=0 switches them off"):
            call()


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
