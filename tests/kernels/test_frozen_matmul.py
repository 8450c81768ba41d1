"""Products with frozen weights of halves and integers against numpy in float64."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import (
    BlockTable,
    FrozenWeight,
    dequantize_blocks,
    frozen_matmul,
    quantize_blocks,
)
from fabric_kernels.table_matmul import xla

Format = Literal["float16", "bfloat16", "int8", "int4"]
FORMATS = pytest.mark.parametrize("form", ["float16", "bfloat16", "int8", "int4"])
LAYERS = 3


def stack_of(n: int, k: int, form: Format) -> tuple[jax.Array | BlockTable, np.ndarray]:
    """Weights [3, n, k] in a format, and their values in float64."""
    values = np.random.default_rng(n + k).standard_normal((LAYERS, n, k)).astype(np.float32)
    if form in ("float16", "bfloat16"):
        floats = jnp.asarray(values).astype(form)
        return floats, np.asarray(floats, np.float64)
    codes, scales = quantize_blocks(values, 8 if form == "int8" else 4)
    table = BlockTable(jnp.asarray(codes), jnp.asarray(scales), k)
    return table, np.asarray(dequantize_blocks(table), np.float64)


def inputs(m: int, n: int, k: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    random = np.random.default_rng(m)
    x, g = (jnp.asarray(random.standard_normal((m, c)), dtype) for c in (k, n))
    return x, g


def both(x: jax.Array, g: jax.Array, weight: FrozenWeight) -> tuple[jax.Array, jax.Array]:
    y, back = jax.vjp(lambda x: frozen_matmul(x, weight), x)
    return y, back(g)[0]


def assert_close(found: jax.Array, exact: np.ndarray, dtype: str) -> None:
    assert found.dtype == dtype
    bound = (2e-6 if dtype == "float32" else 2**-7) * max(1.0, float(np.abs(exact).max()))
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=0, atol=bound)


@FORMATS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("m", "n", "k", "tiled"),
    [(1, 3, 1, False), (3, 130, 33, False), (3, 130, 33, True), (5, 384, 70, True)],
)
def test_products(
    form: Format, dtype: str, m: int, n: int, k: int, tiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles are of 128 rows at least."""
    if tiled:
        monkeypatch.setattr(xla, "TILE_BYTES", 1)
    # A function of its own: JAX would take the other size of tiles for the same program.
    run = jax.jit(lambda x, g, weight: both(x, g, weight))
    values, wide = stack_of(n, k, form)
    x, g = inputs(m, n, k, dtype)
    exact_x, exact_g = np.asarray(x, np.float64), np.asarray(g, np.float64)
    for layer in range(LAYERS):
        y, dx = run(x, g, FrozenWeight(values, jnp.int32(layer)))
        matrix = np.asarray(jnp.asarray(wide[layer], dtype), np.float64)
        assert_close(y, exact_x @ matrix.T, dtype)
        assert_close(dx, exact_g @ matrix, dtype)
    one = jax.tree.map(lambda part: part[-1], values)
    alone = run(x, g, FrozenWeight(one))
    np.testing.assert_allclose(alone[0], y, atol=1e-4)
    np.testing.assert_allclose(alone[1], dx, atol=1e-4)


def test_leading_axes() -> None:
    values, _ = stack_of(20, 33, "int8")
    x, _ = inputs(6, 20, 33, "float32")
    weight = FrozenWeight(values, jnp.int32(1))
    found = frozen_matmul(x.reshape(2, 3, 33), weight)
    np.testing.assert_allclose(found.reshape(6, 20), frozen_matmul(x, weight), atol=1e-5)


@FORMATS
def test_a_large_weight_is_not_converted_whole(form: Format) -> None:
    n, k = 16_000, 1024
    if form in ("bfloat16", "float16"):
        stack: Any = jax.ShapeDtypeStruct((2, n, k), form)
    else:
        width = k if form == "int8" else k // 2
        codes: Any = jax.ShapeDtypeStruct((2, n, width), "int8" if form == "int8" else "uint8")
        scales: Any = jax.ShapeDtypeStruct((2, n, k // 32), "float16")
        stack = BlockTable(codes, scales, k)
    x, g = (jax.ShapeDtypeStruct((4, c), jnp.float32) for c in (k, n))
    layer: Any = jax.ShapeDtypeStruct((), jnp.int32)
    compiled = jax.jit(both).lower(x, g, FrozenWeight(stack, layer)).compile()
    # Tiles of the forward and of the backward product.
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * xla.TILE_BYTES < n * k * 4


def test_wrong_arguments() -> None:
    values, _ = stack_of(20, 33, "int4")
    with pytest.raises(ValueError, match="are contracted"):
        frozen_matmul(jnp.zeros((2, 20)), FrozenWeight(values, jnp.int32(0)))
    with pytest.raises(ValueError, match=r"\[N, K\]"):
        frozen_matmul(jnp.zeros((2, 33)), FrozenWeight(values))
    wrong = BlockTable(jnp.zeros((20, 33)), jnp.zeros((20, 2)), 33)
    with pytest.raises(TypeError, match="float16 scales"):
        frozen_matmul(jnp.zeros((2, 33)), FrozenWeight(wrong))
