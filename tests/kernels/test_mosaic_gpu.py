"""The Hopper kernels: arithmetic in interpret mode, lowering anywhere, exactness on a GPU."""

from functools import partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import LowRank
from fabric_kernels.packing import pack
from fabric_kernels.ternary_matmul import mosaic_gpu, mosaic_gpu_planes, mosaic_gpu_rows, xla
from fabric_kernels.ternary_matmul.mosaic_gpu_planes_tiles import Tiles
from fabric_kernels.ternary_matmul.mosaic_gpu_stack import whole_tiles
from fabric_kernels.ternary_matmul.triton_group import turned
from fabric_kernels.ternary_matmul.weight import TernaryWeight
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.test_triton_kernel import imagined

INT32 = jnp.dtype(jnp.int32)
TILES = [
    Tiles(8, codes=512),
    Tiles(16, codes=256, parts=2),
    Tiles(64, codes=256),
    Tiles(96, parts=3),
    Tiles(128, parts=2),
    Tiles(128, codes=256, parts=4),
    Tiles(176),
    Tiles(256),
]


@pytest.fixture
def interpret() -> Any:
    # Both supported versions of jax have it, not yet where users look.
    params = import_module("jax._src.pallas.mosaic_gpu.interpret.params")
    return params.InterpretGPUParams()


def _problem(
    m: int, n: int, k: int, layers: int | None = None, code: int | None = None, x: int | None = None
) -> tuple[np.ndarray, np.ndarray, TernaryWeight]:
    rng = np.random.default_rng(m + n + k)
    codes = rng.integers(-1, 2, (n, k)).astype(np.int8)
    if code is not None:
        codes = np.full((n, k), code, np.int8)
    tokens = rng.integers(-128, 128, (m, k)).astype(np.int8)
    if x is not None:
        tokens = np.full((m, k), x, np.int8)
    packed, layer, scale = pack(jnp.asarray(codes), "ternary2"), None, jnp.float32(0.37)
    if layers is not None:
        others = [jnp.full_like(packed, 0x55)] * (layers - 1)
        packed, layer = jnp.stack([*others, packed]), jnp.asarray(layers - 1)
        scale = jnp.arange(1, layers + 1, dtype=jnp.float32) / 8
    return tokens, codes, TernaryWeight(packed, scale, layer, k)


def _exact(tokens: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return tokens.astype(np.int64) @ codes.astype(np.int64).T


@pytest.mark.parametrize("layers", [None, 3])
def test_interpreted_product_is_exact(interpret: Any, layers: int | None) -> None:
    tokens, codes, weight = _problem(128, 64, 512, layers)
    product = mosaic_gpu.matmul(jnp.asarray(tokens), weight, interpret=interpret)
    np.testing.assert_array_equal(product, _exact(tokens, codes))


@pytest.mark.parametrize("most_in_planes", [0, 64])
def test_interpreted_linear_is_that_of_xla(
    interpret: Any, most_in_planes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mosaic_gpu, "MOST_IN_PLANES", most_in_planes)
    _, _, weight = _problem(64, 64, 256, 2)
    x = jax.random.normal(jax.random.key(0), (2, 32, 256), jnp.float32)
    (got,) = mosaic_gpu.linear(x, [weight], interpret=interpret)
    (want,) = xla.linear(x, [weight])
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_interpreted_product_of_planes_is_exact(interpret: Any) -> None:
    """Two tiles of tokens, an odd number of steps, outputs and inputs that are filled up."""
    tokens, codes, weight = _problem(40, 70, 640, 3, x=-128)
    tokens[:, ::3] = 127
    x = jnp.asarray(tokens)
    sums = jnp.sum(x, axis=1, dtype=jnp.int32)
    product = mosaic_gpu_planes.product(
        turned(x), sums, weight, None, INT32, tiles=Tiles(32), interpret=interpret
    )
    np.testing.assert_array_equal(product, _exact(tokens, codes))


@pytest.mark.parametrize(
    ("m", "rank", "in_planes"),
    [(1, None, True), (1024, None, True), (1025, None, False), (8, 4, False)],
)
def test_planes_are_for_few_tokens_without_adapters(
    m: int, rank: int | None, in_planes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, weight = _problem(1, 64, 256)
    adapter = None if rank is None else LowRank(jnp.zeros((rank, 256)), jnp.zeros((rank, 64)), 1.0)
    found: list[str] = []

    def note(module: Any) -> None:
        product = module.product

        def noted(*args: Any, **options: Any) -> jax.Array:
            found.append(module.__name__.rsplit("_", 1)[1])
            return product(*args, **options)

        monkeypatch.setattr(module, "product", noted)

    note(mosaic_gpu_planes)
    note(mosaic_gpu_rows)
    x = jax.ShapeDtypeStruct((m, 256), jnp.bfloat16)
    run = lambda x: mosaic_gpu.linear_with_adapters(x, [weight] * 2, [adapter, None])  # noqa: E731
    jax.eval_shape(run, x)
    assert found == ["planes" if in_planes else "rows"] * 2


def _of_planes(
    x: jax.Array, sums: jax.Array, weight: TernaryWeight, tiles: Tiles | None
) -> jax.Array:
    return mosaic_gpu_planes.product(x, sums, weight, None, INT32, tiles=tiles)


@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_tiles_lower(tiles: Tiles) -> None:
    _, _, weight = _problem(300, 264, 1536, 2)
    operands = jnp.ones((300, 1536), jnp.int8), jnp.ones(300, jnp.int32), weight
    traced = jax.jit(partial(_of_planes, tiles=tiles)).trace(*operands)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layers", [None, 2])
@pytest.mark.parametrize("shape", [(1, 3, 5), (100, 130, 515), (300, 4096, 4096), (1100, 130, 515)])
def test_lowers_without_a_gpu(shape: tuple[int, int, int], layers: int | None, dtype: str) -> None:
    _, _, weight = _problem(*shape, layers)
    x = jnp.ones((shape[0], shape[2]), dtype)
    # Its quantiser is Triton's, which jax 0.11 lowers for a device that is there or imagined.
    with imagined("cuda"):
        traced = jax.jit(lambda x, w: mosaic_gpu.linear(x, [w])[0]).trace(x, weight)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert traced.out_info.shape == shape[:2]
    assert traced.out_info.dtype == dtype
    assert "mosaic_gpu" in text


def test_stack_is_not_copied() -> None:
    _, _, weight = _problem(128, 128, 512, 3)
    x = jnp.ones((128, 512), jnp.int8)
    of_planes = partial(_of_planes, tiles=None)
    for traced in (
        jax.jit(mosaic_gpu.matmul).trace(x, weight),
        jax.jit(of_planes).trace(x, jnp.ones(128, jnp.int32), weight),
    ):
        lowered = traced.lower(lowering_platforms=("cuda",))
        assert "slice" not in lowered.as_text().split("mosaic_gpu")[0]


def test_refuses_other_packings() -> None:
    weight = TernaryWeight(jnp.zeros((4, 2), jnp.uint8), jnp.float32(1), None, 10, "ternary1.6")
    with pytest.raises(ValueError, match=r"ternary1\.6"):
        mosaic_gpu.matmul(jnp.zeros((64, 10), jnp.int8), weight)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    "problem",
    [
        {"m": 1, "n": 3, "k": 5},
        {"m": 100, "n": 130, "k": 515},
        {"m": 300, "n": 264, "k": 1152, "layers": 3},
        {"m": 2050, "n": 2184, "k": 1408, "layers": 2},
        {"m": 70, "n": 128, "k": 640, "code": 0},
        {"m": 257, "n": 392, "k": 640, "code": -1, "x": -128},
        {"m": 64, "n": 64, "k": 8192, "code": 1, "x": 127},
    ],
    ids=str,
)
def test_product_is_exact(problem: dict[str, int]) -> None:
    tokens, codes, weight = _problem(**problem)
    product = jax.jit(mosaic_gpu.matmul)(jnp.asarray(tokens), weight)
    np.testing.assert_array_equal(product, _exact(tokens, codes))


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("size", [(300, 392, 1536), (5, 40, 128)], ids=str)
@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_tiles_are_exact(tiles: Tiles, size: tuple[int, int, int]) -> None:
    """Cut off at all ends; sums over clusters; blocks of which parts have nothing to do.

    Of the largest codes: sums of fields and of codes are as far apart as they get.
    """
    tokens, codes, weight = _problem(*size, 2, x=-128)
    tokens[:, ::3] = 127
    x = jnp.asarray(tokens)
    sums = jnp.sum(x, axis=1, dtype=jnp.int32)
    product = jax.jit(partial(_of_planes, tiles=tiles))(turned(x), sums, weight)
    np.testing.assert_array_equal(product, _exact(tokens, codes))


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("n", [40, 264])
@pytest.mark.parametrize("m", [5, 300, 1100])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_linear_is_that_of_xla(dtype: str, m: int, n: int) -> None:
    _, _, weight = _problem(m, n, 1152, 3)
    x = jax.random.normal(jax.random.key(0), (m, 1152), dtype)
    got = jax.jit(lambda x, w: mosaic_gpu.linear(x, [w])[0])(x, weight)
    want = jax.jit(lambda x, w: xla.linear(x, [w])[0])(x, weight)
    tolerance = 2**-7 if dtype == "bfloat16" else 1e-6
    np.testing.assert_allclose(
        got.astype(jnp.float32), want.astype(jnp.float32), rtol=tolerance, atol=1e-30
    )


@given(st.integers(1, 1000), st.sampled_from([8, 32, 64]))
def test_axes_have_two_tiles_or_more(size: int, tile: int) -> None:
    """A copy of one tile along an axis of one tile would not be held against that axis."""
    whole = whole_tiles(size, tile)
    assert whole >= 2 * tile
    assert whole % tile == 0
    assert size <= whole < size + 2 * tile
