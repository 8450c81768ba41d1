"""Quantised tables: codes against the gguf package, products against float64 of their values."""

from typing import Any, cast

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import (
    BlockTable,
    dequantize_blocks,
    quantize_blocks,
    table_matmul,
    table_matmul_transposed,
)
from fabric_kernels.block_quantization import TableBits, table_bytes
from fabric_kernels.table_matmul import quantized

from tests.kernels.conftest import need_cpu_kernels

KINDS = {8: gguf.GGMLQuantizationType.Q8_0, 4: gguf.GGMLQuantizationType.Q4_0}
BITS = pytest.mark.parametrize("bits", [8, 4])
# (M, N, K): short groups, odd widths, several tiles (of 40 rows of 64 values, see small_tiles).
SHAPES = [(1, 1, 1), (3, 7, 31), (2, 5, 33), (4, 100, 64), (5, 121, 70), (2, 39, 64), (2, 80, 64)]


def make(n: int, k: int, bits: TableBits) -> BlockTable:
    values = np.random.default_rng(n + k).standard_normal((n, k)).astype(np.float32)
    codes, scales = quantize_blocks(values, bits)
    return BlockTable(jnp.asarray(codes), jnp.asarray(scales), k)


def values_of(table: BlockTable) -> np.ndarray:
    """Float64 values by the diagram in the module's docstring, with numpy alone."""
    codes = np.asarray(table.codes)
    if table.bits == 4:
        pairs = [codes & 15, codes >> 4]
        codes = np.stack(pairs, -1).reshape(*codes.shape[:-1], -1)[..., : table.k].astype(int) - 8
    scales = np.asarray(table.scales, np.float64)
    return codes * np.repeat(scales, 32, -1)[..., : table.k]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "TILE_BYTES", 4 * 64 * 40)


@BITS
def test_codes_and_scales_are_those_of_gguf(bits: TableBits) -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((300, 96)) * np.exp(3 * random.standard_normal((300, 1)))
    x = x.astype(np.float32)
    x[5, :32], x[6, 3] = 0, -30
    # Halves: with a largest value of 127 (-8) the inverse is exact.
    x[7, :32] = np.arange(32) - 15.5
    x[7, 0] = -127 if bits == 8 else -8
    theirs = gguf.quants.quantize(x, KINDS[bits])
    blocks = theirs.reshape(300, 3, -1)
    codes, scales = quantize_blocks(x, bits)
    np.testing.assert_array_equal(scales, blocks[..., :2].copy().view(np.float16)[..., 0])
    table = BlockTable(jnp.asarray(codes), jnp.asarray(scales), 96)
    if bits == 8:
        np.testing.assert_array_equal(codes, blocks[..., 2:].reshape(300, 96).view(np.int8))
    np.testing.assert_array_equal(
        dequantize_blocks(table), gguf.quants.dequantize(theirs, KINDS[bits])
    )


@BITS
@pytest.mark.parametrize("k", [1, 2, 31, 32, 33, 63, 70])
def test_values_bytes_and_error(bits: TableBits, k: int) -> None:
    values = np.random.default_rng(k).standard_normal((2, 9, k)).astype(np.float32)
    codes, scales = quantize_blocks(values, bits)
    table = BlockTable(jnp.asarray(codes), jnp.asarray(scales), k)
    table.check()
    assert table.shape == (2, 9, k)
    assert codes.nbytes + scales.nbytes == table_bytes(18, k, bits)
    exact = values_of(table)
    np.testing.assert_array_equal(np.asarray(dequantize_blocks(table), np.float64), exact)
    narrow = dequantize_blocks(table, "bfloat16")
    np.testing.assert_array_equal(narrow, jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16))
    # Half a step, or a whole one at the end of int4 that lacks the code 8; scales lose 2^-11.
    step = np.repeat(np.abs(scales.astype(np.float64)), 32, -1)[..., :k]
    bound = step * (0.5 + 0.1 if bits == 8 else 1.01)
    assert (np.abs(exact - values) <= bound).all()
    assert k % 2 == 0 or bits == 8 or (codes[..., -1] >> 4 == 8).all()


@BITS
@pytest.mark.parametrize("value", [0.0, 1e-42, -1e-42])
def test_groups_too_small_for_a_scale(bits: TableBits, value: float) -> None:
    codes, scales = quantize_blocks(np.full((2, 40), value, np.float32), bits)
    table = BlockTable(jnp.asarray(codes), jnp.asarray(scales), 40)
    np.testing.assert_array_equal(dequantize_blocks(table), 0)


@BITS
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_products(bits: TableBits, m: int, n: int, k: int) -> None:
    table = make(n, k, bits)
    wide = values_of(table)
    random = np.random.default_rng(m)
    x, g = (jnp.asarray(random.standard_normal((2, m, c)), jnp.float32) for c in (k, n))
    for found, exact in (
        (table_matmul(x, table), np.asarray(x, np.float64) @ wide.T),
        (table_matmul_transposed(g, table), np.asarray(g, np.float64) @ wide),
    ):
        assert found.dtype == jnp.float32
        bound = 1e-6 * max(1.0, float(np.abs(exact).max()))
        np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=0, atol=bound)
        mapped = jax.vmap(lambda x: table_matmul(x, table))(x)
        np.testing.assert_allclose(mapped, table_matmul(x, table), atol=1e-5)


@BITS
@pytest.mark.usefixtures("small_tiles")
def test_gradients(bits: TableBits) -> None:
    table = make(90, 70, bits)
    wide = dequantize_blocks(table)
    random = np.random.default_rng(1)
    x, g = (jnp.asarray(random.standard_normal((3, c)), jnp.float32) for c in (70, 90))

    def forward(x: jax.Array, table: Any) -> jax.Array:
        return jnp.sin(table_matmul(x, table)).sum()

    def backward(g: jax.Array, table: Any) -> jax.Array:
        return jnp.sin(table_matmul_transposed(g, table)).sum()

    for function, argument in ((forward, x), (backward, g)):
        found, frozen = jax.grad(function, (0, 1), allow_int=True)(argument, table)
        expected = jax.grad(function)(argument, wide)
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert frozen.codes.dtype == jax.dtypes.float0
        np.testing.assert_array_equal(frozen.scales, 0)


@BITS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_wide_copy_of_the_table_is_made(bits: TableBits, dtype: str) -> None:
    n, k, tiles = 40_000, 512, 6
    like = make(1, k, bits)
    codes, scales = (
        jax.ShapeDtypeStruct((n, part.shape[1]), part.dtype) for part in (like.codes, like.scales)
    )
    table = BlockTable(cast(Any, codes), cast(Any, scales), k)
    x = jax.ShapeDtypeStruct((tiles, 4, k), dtype)

    def both(x: jax.Array, table: BlockTable) -> jax.Array:
        def body(total: jax.Array, tile: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = table_matmul(tile, table).astype(dtype)
            return total + logits.sum(), table_matmul_transposed(logits, table)

        return jax.lax.scan(body, jnp.zeros((), dtype), x)[1]

    compiled = jax.jit(both).lower(x, table).compile()
    # A tile in float32 and in bfloat16, as it was and as a product wants it, and its codes.
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * quantized.TILE_BYTES < 2 * n * k


@pytest.mark.parametrize(("rows", "n", "k"), [(1, 70, 96), (3, 33, 70), (7, 5, 8), (16, 2, 200)])
def test_the_cpu_kernel_multiplies_the_stored_values(rows: int, n: int, k: int) -> None:
    need_cpu_kernels()
    table = make(n, k, 8)
    x = np.random.default_rng(0).normal(size=(rows, k)).astype(np.float32)
    values = np.asarray(dequantize_blocks(table), np.float64)
    found = table_matmul(jnp.asarray(x), table, implementation="cpu")
    np.testing.assert_allclose(found, x @ values.T, rtol=0, atol=1e-5 * np.abs(values).max() * k)


def test_wrong_arguments() -> None:
    table = make(4, 8, 8)
    with pytest.raises(ValueError, match="are contracted"):
        table_matmul(jnp.zeros((2, 4)), table)
    with pytest.raises(ValueError, match="with int8 codes; found 'cpu'"):
        table_matmul(jnp.zeros((2, 8)), make(4, 8, 4), implementation="cpu")
    with pytest.raises(ValueError, match=r"has codes \[4, 40\] and scales \[4, 2\], found"):
        table_matmul(jnp.zeros((2, 40)), BlockTable(table.codes, table.scales, 40))
    with pytest.raises(TypeError, match="found int8 and float32"):
        BlockTable(table.codes, table.scales.astype(jnp.float32), 8).check()
