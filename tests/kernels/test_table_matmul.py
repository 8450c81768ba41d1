"""Products with tables of floats against numpy in float64."""

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import cpu_library, table_matmul, table_matmul_transposed
from fabric_kernels.table_matmul import xla
from fabric_kernels.table_matmul.api import Implementation
from jax.test_util import check_grads

DTYPES = ["float32", "bfloat16", "float16"]
# (M, N, K): few rows, odd sizes, several panels and blocks of steps.
SHAPES = [(1, 1, 1), (1, 70, 131), (3, 33, 40), (4, 7, 5), (13, 100, 65), (300, 37, 530)]


CPU_KERNELS = jax.default_backend() == "cpu" and cpu_library.available()


@pytest.fixture(params=["xla", "cpu"])
def implementation(request: pytest.FixtureRequest) -> Implementation:
    if request.param == "cpu" and not CPU_KERNELS:
        pytest.skip("the CPU kernels are not available here")
    return request.param


def problem(m: int, n: int, k: int, dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    random = np.random.default_rng(m + n + k)
    x, g = (jnp.asarray(random.standard_normal((m, c)), jnp.float32) for c in (k, n))
    return x, g, jnp.asarray(random.standard_normal((n, k)), dtype)


def assert_close(found: jax.Array, exact: np.ndarray, terms: int) -> None:
    assert found.dtype == jnp.float32
    bound = 2e-7 * terms**0.5 * max(1.0, float(np.abs(exact).max()))
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_products(implementation: Implementation, m: int, n: int, k: int, dtype: str) -> None:
    if implementation == "xla" and dtype == "float16":
        pytest.skip("the portable product casts the table to the dtype of x: tested as bfloat16")
    x, g, table = problem(m, n, k, dtype)
    wide = np.asarray(table, np.float64)
    y = table_matmul(x, table, implementation=implementation)
    assert_close(y, np.asarray(x, np.float64) @ wide.T, k)
    dx = table_matmul_transposed(g, table, implementation=implementation)
    assert_close(dx, np.asarray(g, np.float64) @ wide, n)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("m", "n", "k"), [(2, 70, 131), (17, 64, 256), (64, 1300, 200)])
def test_tens_of_rows_on_gpus(m: int, n: int, k: int, dtype: str, stored: str) -> None:
    """The Triton kernel, interpreted on CPU: sums in float32 of what both round to."""
    x, g, table = problem(m, n, k, stored)
    x, g = x.astype(dtype).reshape(m, 1, k), g.astype(dtype).reshape(m, 1, n)
    wide = np.asarray(table.astype(dtype), np.float64)
    y = table_matmul(x, table, implementation="triton")
    assert_close(y, np.asarray(x, np.float64) @ wide.T, k)
    dx = table_matmul_transposed(g, table, implementation="triton")
    assert_close(dx, np.asarray(g, np.float64) @ wide, n)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
@pytest.mark.parametrize("m", [2, 32, 64])
def test_heads_of_models_on_a_device(m: int, stored: str) -> None:
    x, g, table = problem(m, 32_002, 2048, stored)
    x, g = x.astype(jnp.bfloat16), g.astype(jnp.bfloat16)
    wide = np.asarray(table.astype(jnp.bfloat16), np.float64)
    y = jax.jit(partial(table_matmul, implementation="triton"))(x, table)
    assert_close(y, np.asarray(x, np.float64) @ wide.T, 2048)
    dx = jax.jit(partial(table_matmul_transposed, implementation="triton"))(g, table)
    assert_close(dx, np.asarray(g, np.float64) @ wide, 32_002)


def test_the_kernel_for_tens_of_rows_refuses_others() -> None:
    x, g, table = problem(4, 5, 8, "bfloat16")
    with pytest.raises(ValueError, match=r"takes two to 64 rows .* found float32 \[4, 8\]"):
        table_matmul(x, table, implementation="triton")
    with pytest.raises(ValueError, match="takes two to 64 rows"):
        table_matmul(x[:1].astype(jnp.bfloat16), table, implementation="triton")
    with pytest.raises(ValueError, match=r"takes two to 64 rows .* found float32 \[4, 5\]"):
        table_matmul_transposed(g, table, implementation="triton")


def test_a_table_of_many_rows_is_taken_in_passes(implementation: Implementation) -> None:
    _, g, table = problem(5, 2500, 33, "bfloat16")
    dx = table_matmul_transposed(g, table, implementation=implementation)
    assert_close(dx, np.asarray(g, np.float64) @ np.asarray(table, np.float64), 2500)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_half_precision_number_is_widened_exactly(dtype: str) -> None:
    if not CPU_KERNELS:
        pytest.skip("the CPU kernels are not available here")
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = np.asarray(jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.dtype(dtype)))
    wide = np.abs(values.astype(np.float32))
    # Numbers that float32 holds as subnormals may be flushed to zero by either side.
    finite = values[np.isfinite(wide) & ((wide == 0) | (wide >= np.finfo(np.float32).tiny))]
    table = jnp.asarray(np.resize(finite, (len(finite) // 64, 64)))
    rows = table_matmul_transposed(jnp.eye(len(table)), table, implementation="cpu")
    np.testing.assert_array_equal(rows, table.astype(jnp.float32))


def test_leading_axes_jit_scan_and_vmap(implementation: Implementation) -> None:
    x, _, table = problem(6, 11, 20, "bfloat16")
    exact = np.asarray(table_matmul(x, table, implementation="xla"))

    def product(x: jax.Array) -> jax.Array:
        return table_matmul(x, table, implementation=implementation)

    np.testing.assert_allclose(product(x.reshape(2, 3, 20)).reshape(6, 11), exact, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(product)(x), exact, atol=1e-5)
    scanned = jax.jit(lambda x: jax.lax.scan(lambda c, row: (c, product(row)), 0, x)[1])(x)
    np.testing.assert_allclose(scanned, exact, atol=1e-5)


def test_gradients(implementation: Implementation) -> None:
    x, g, table = problem(3, 7, 5, "float32")
    both = lambda x, t: jnp.sin(table_matmul(x, t, implementation=implementation))  # noqa: E731
    check_grads(both, (x, table), 2, ["rev"], atol=2e-2, rtol=2e-2)
    back = lambda g, t: jnp.sin(table_matmul_transposed(g, t, implementation=implementation))  # noqa: E731
    check_grads(back, (g, table), 2, ["rev"], atol=2e-2, rtol=2e-2)


def test_no_wide_copy_of_a_half_precision_table_is_made() -> None:
    if not CPU_KERNELS:
        pytest.skip("the CPU kernels are not available here")
    table = jax.ShapeDtypeStruct((4096, 256), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((8, 256), jnp.float32)
    compiled = jax.jit(lambda x, t: table_matmul(x, t, implementation="cpu")).lower(x, table)
    assert compiled.compile().memory_analysis().temp_size_in_bytes < 4096 * 256


@pytest.mark.parametrize("rows", [700, 768])
def test_a_large_table_is_taken_by_tiles(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, g, table = problem(3, rows, 40, "bfloat16")
    wide = np.asarray(table, np.float64)
    monkeypatch.setattr(xla, "TILE_BYTES", 256 * 40 * 4)
    assert xla.tile_rows(rows, 40, x.dtype) == 256
    y = table_matmul(x, table, implementation="xla")
    assert_close(y, np.asarray(x, np.float64) @ wide.T, 40)
    dx = table_matmul_transposed(g, table, implementation="xla")
    assert_close(dx, np.asarray(g, np.float64) @ wide, rows)


def test_no_cast_copy_of_a_large_table_is_made() -> None:
    rows, k = 32_002, 1024
    table = jax.ShapeDtypeStruct((rows, k), jnp.float16)
    x = jax.ShapeDtypeStruct((16, k), jnp.bfloat16)

    def both(x: jax.Array, table: jax.Array) -> jax.Array:
        y = table_matmul(x, table, implementation="xla").astype(jnp.bfloat16)
        return table_matmul_transposed(y, table, implementation="xla")

    temporary = jax.jit(both).lower(x, table).compile().memory_analysis().temp_size_in_bytes
    # A tile in float32, which CPU's dots take instead of bfloat16, beside it in bfloat16; logits.
    assert temporary < 4 * xla.TILE_BYTES
    assert temporary < rows * k * 2


def test_wrong_arguments() -> None:
    table = jnp.zeros((4, 8))
    with pytest.raises(ValueError, match="are contracted"):
        table_matmul(jnp.zeros((2, 4)), table)
    with pytest.raises(ValueError, match="are contracted"):
        table_matmul_transposed(jnp.zeros((2, 8)), table)
    with pytest.raises(ValueError, match="has the implementations xla, cpu"):
        table_matmul(jnp.zeros((2, 8)), table, implementation=cast(Any, "cuda"))
