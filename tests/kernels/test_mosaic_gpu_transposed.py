"""The Hopper kernel of the backward product: interpreted, lowered anywhere, and run on a GPU."""

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels.packing import pack
from fabric_kernels.ternary_matmul import mosaic_gpu, mosaic_gpu_transposed
from fabric_kernels.ternary_matmul.mosaic_gpu_transposed import Tiles
from fabric_kernels.ternary_matmul.weight import TernaryWeight

from tests.kernels.test_triton_kernel import ON_GPU

BOUND = 5e-3
"""Of ``|dx - exact| / |exact|``: half a step of bfloat16 in the output is 1.7e-3 of that."""
SHAPES = [(768, 768), (2048, 768), (2048, 2048), (5632, 2048), (6912, 2560), (13824, 5120)]
"""[N, K] of models from 125M to 13B."""

Group = tuple[list[jax.Array], list[TernaryWeight], np.ndarray]


def _group(
    m: int, outputs: Sequence[int], k: int, scales: Sequence[float], dtype: Any = jnp.bfloat16
) -> Group:
    """Gradients, the second layers of stacks, and the exact sum."""
    rng = np.random.default_rng(m + k)
    gradients: list[jax.Array] = []
    weights: list[TernaryWeight] = []
    exact = np.zeros((m, k))
    for n, scale in zip(outputs, scales, strict=True):
        codes = rng.integers(-1, 2, (n, k)).astype(np.int8)
        g = jnp.asarray(rng.standard_normal((m, n)), dtype)
        packed = pack(jnp.asarray(codes), "ternary2")
        stack = jnp.stack([jnp.full_like(packed, 0x55), packed])
        layers = jnp.asarray([9.0, scale], jnp.float32)
        weights.append(TernaryWeight(stack, layers, jnp.asarray(1), k))
        gradients.append(g)
        # Of a float32's product here, which is exact enough beside the bound and much faster.
        product = np.asarray(g, np.float32) @ codes.astype(np.float32)
        exact += np.float32(scale) * product.astype(np.float64)
    return gradients, weights, exact


def _relative(found: Any, exact: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact))


@pytest.mark.skipif(ON_GPU, reason="interpreted; on a GPU the kernel itself is run")
def test_interpreted_sum_of_a_group() -> None:
    """Two tiles of k, an odd number of steps, sizes that are padded, a scale of 0."""
    # Both supported versions of jax have it, not yet where users look.
    interpret = import_module("jax._src.pallas.mosaic_gpu.interpret.params").InterpretGPUParams()
    gradients, weights, exact = _group(13, (130, 64), 270, (-0.3, 0.0))

    # Not compiled with anything else: an interpreted kernel calls back, and may wait for itself.
    dx = mosaic_gpu_transposed.product(gradients, weights, tiles=Tiles(16), interpret=interpret)
    assert (dx.shape, dx.dtype) == ((13, 270), jnp.bfloat16)
    assert _relative(dx, exact) < BOUND


@pytest.mark.parametrize("shape", [(128, 3, 5), (300, 4096, 2048), (8192, 130, 515)])
def test_lowers_without_a_gpu(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    packed = jax.ShapeDtypeStruct((3, n, -(-k // 4)), jnp.uint8)
    scale, layer = jax.ShapeDtypeStruct((3,), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    weights = [TernaryWeight(packed, scale, layer, k)] * 2  # pyright: ignore[reportArgumentType]
    gradients = [jax.ShapeDtypeStruct((m, n), jnp.bfloat16)] * 2
    traced = jax.jit(mosaic_gpu.linear_transposed).trace(gradients, weights)
    assert traced.out_info.shape == (m, k)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1
    if n % 64 == 0:
        assert "slice" not in text.split("@mosaic_gpu")[0]


def test_sums_over_clusters_lower() -> None:
    gradients, weights, _ = _group(100, (130, 640), 270, (1.0, 2.0))

    def run(gradients: Any, weights: Any) -> jax.Array:
        return mosaic_gpu_transposed.product(gradients, weights, tiles=Tiles(64, parts=4))

    traced = jax.jit(run).trace(gradients, weights)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_tiles_fill_the_rounds_of_multiprocessors() -> None:
    choose = mosaic_gpu_transposed.choose_tiles
    assert choose(8192, 2048, 2048) == Tiles(256)
    assert choose(1024, 5632, 2048) == Tiles(176)
    # Few tiles of long sums are cut up along these.
    assert choose(128, 5120, 13824).parts == 2


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("m", [1024, 2050])
def test_product_of_models(m: int, shape: tuple[int, int]) -> None:
    gradients, weights, exact = _group(m, shape[:1], shape[1], (0.37,))
    dx = jax.jit(mosaic_gpu_transposed.product)(gradients, weights)
    assert _relative(dx, exact) < BOUND


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    "tiles",
    [
        Tiles(*sizes)
        for sizes in ((64,), (112,), (176,), (256,), (64, 2), (128, 2), (96, 3), (128, 4))
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_groups(dtype: str, tiles: Tiles) -> None:
    """Matrices of several sizes and scales; tiles cut off at both ends; always the same bits."""
    outputs, scales = (768, 130, 320), (0.37, -1e-3, 21.0)
    gradients, weights, exact = _group(1003, outputs, 1284, scales, dtype)

    def run(gradients: Any, weights: Any) -> jax.Array:
        return mosaic_gpu_transposed.product(gradients, weights, tiles=tiles)

    dx = jax.jit(run)(gradients, weights)
    assert _relative(dx, exact) < BOUND
    np.testing.assert_array_equal(dx, jax.jit(run)(gradients, weights))


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("tiles", [None, Tiles(64), Tiles(64, 2), Tiles(128, 4)], ids=str)
@pytest.mark.parametrize("m", [1, 63, 200])
def test_odd_sizes(m: int, tiles: Tiles | None) -> None:
    """A scale of 0; blocks of which parts have nothing to do."""
    gradients, weights, exact = _group(m, (5, 67), 7, (1.5, 0.0))
    dx = jax.jit(partial(mosaic_gpu_transposed.product, tiles=tiles))(gradients, weights)
    assert _relative(dx, exact) < BOUND
