"""The Pallas-Triton kernels: interpreted on CPU, compiled where there is a GPU."""

import builtins
import contextlib
import sys
import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import Packing, Prologue, TernaryWeight, pack, ternary_linear, triton_call
from fabric_kernels.ternary_matmul import triton, xla

from tests.kernels.linear_problems import Problem, rows_of

ON_GPU = jax.default_backend() == "gpu"
PACKINGS: tuple[Packing, ...] = ("ternary2", "ternary1.6")


def codes_of(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1, 2, (n, k)).astype(np.int8)


def int8_rows(m: int, k: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(-128, 128, (m, k)).astype(np.int8)


def float_rows(m: int, k: int, dtype: Any, seed: int = 2) -> jax.Array:
    rows = np.random.default_rng(seed).standard_normal((m, k))
    return jnp.asarray(rows.astype(np.float32)).astype(dtype)


def weight_of(codes: np.ndarray, packing: Packing = "ternary2") -> TernaryWeight:
    packed = pack(jnp.asarray(codes), packing)
    return TernaryWeight(packed, jnp.float32(0.5), None, codes.shape[-1], packing)


def exact(x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return x.astype(np.int64) @ codes.astype(np.int64).T


def relative(found: jax.Array, expected: np.ndarray) -> float:
    error = np.linalg.norm(np.asarray(found, np.float64).reshape(expected.shape) - expected)
    return float(error / np.linalg.norm(expected))


# One token, few, a tile that isn't full, several tiles; K below and above one vector of bytes.
SHAPES = [(1, 1, 1), (2, 5, 7), (3, 6, 2100), (8, 33, 66), (9, 7, 70), (67, 70, 130)]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES, ids=str)
def test_integers_are_exact(m: int, n: int, k: int, packing: Packing) -> None:
    x, codes = int8_rows(m, k), codes_of(n, k)
    found = jax.jit(triton.matmul)(jnp.asarray(x), weight_of(codes, packing))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, exact(x, codes))


@pytest.mark.parametrize("m", [1, 20])
@pytest.mark.parametrize("value", [-128, 127])
def test_extreme_codes(m: int, value: int) -> None:
    n, k = 18, 2052
    codes = np.repeat(np.array([[-1], [0], [1]], np.int8), 6, axis=0) * np.ones((1, k), np.int8)
    found = jax.jit(triton.matmul)(jnp.full((m, k), value, jnp.int8), weight_of(codes))
    expected = np.repeat([-value * k, 0, value * k], 6)
    np.testing.assert_array_equal(found, np.broadcast_to(expected, (m, n)))


@pytest.mark.parametrize("m", [2, 40])
def test_zeros(m: int) -> None:
    zeros = weight_of(np.zeros((9, 48), np.int8))
    (y,) = jax.jit(triton.linear)(float_rows(m, 48, jnp.float32), (zeros,))
    assert not np.any(np.asarray(y))
    dx = jax.jit(triton.linear_transposed)((float_rows(m, 9, jnp.float32),), (zeros,))
    assert not np.any(np.asarray(dx))
    (y,) = jax.jit(triton.linear)(jnp.zeros((m, 48)), (weight_of(codes_of(9, 48)),))
    assert not np.any(np.asarray(y))


@pytest.mark.parametrize("leading", [(0,), (2, 0), ()], ids=str)
def test_leading_axes(leading: tuple[int, ...]) -> None:
    weight = weight_of(codes_of(9, 12))
    (y,) = triton.linear(jnp.ones((*leading, 12)), (weight,))
    assert y.shape == (*leading, 9)
    assert triton.matmul(jnp.ones((*leading, 12), jnp.int8), weight).shape == (*leading, 9)
    assert triton.linear_transposed((y,), (weight,)).shape == (*leading, 12)
    assert triton.matmul_transposed(y, weight).shape == (*leading, 12)


@pytest.mark.parametrize(
    "problem",
    [
        Problem(n=(12, 30, 7), k=75, leading=(3,), ranks=(None,) * 3, dtype="bfloat16"),
        Problem(n=(40, 16), k=129, leading=(5, 4), ranks=(None,) * 2),
        Problem(n=(9, 6), k=66, leading=(2,), ranks=(None,) * 2, packing="ternary1.6"),
    ],
    ids=str,
)
def test_grouped_linear(problem: Problem) -> None:
    found = jax.jit(triton.linear)(problem.x, problem.weights)
    expected = jax.jit(xla.linear)(problem.x, problem.weights)
    for ours, reference in zip(found, expected, strict=True):
        assert ours.dtype == reference.dtype
        assert ours.shape == reference.shape
        step = 2.0**-7 if problem.dtype == "bfloat16" else 1e-6
        np.testing.assert_allclose(rows_of(ours), rows_of(reference), rtol=step, atol=0)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_float_products(dtype: str, packing: Packing) -> None:
    m, n, k = 35, 70, 130
    codes = codes_of(n, k)
    weight = weight_of(codes, packing)
    bound = 1e-6 if dtype == "float32" else 5e-3
    x, g = float_rows(m, k, dtype), float_rows(m, n, dtype)
    y = jax.jit(triton.matmul)(x, weight)
    dx = jax.jit(triton.matmul_transposed)(g, weight)
    assert y.dtype == dtype
    assert dx.dtype == dtype
    assert relative(y, rows_of(x) @ codes.T) < bound
    assert relative(dx, rows_of(g) @ codes) < bound


@pytest.mark.parametrize("packing", PACKINGS)
def test_grouped_transposed(packing: Packing) -> None:
    problem = Problem(
        n=(40, 16, 24), k=70, leading=(20,), ranks=(None,) * 3, packing=packing, dtype="bfloat16"
    )
    dx = jax.jit(triton.linear_transposed)(problem.gradients, problem.weights)
    assert dx.dtype == problem.dtype
    expected = sum(
        scale * (rows_of(g) @ codes)
        for g, codes, scale in zip(problem.gradients, problem.codes, problem.scales, strict=True)
    )
    assert relative(dx, np.asarray(expected)) < 5e-3


@pytest.mark.parametrize("m", [2, 20])
def test_stack_at_a_traced_layer(m: int) -> None:
    layers, n, k = 3, 10, 36
    codes = np.stack([codes_of(n, k, seed) for seed in range(layers)])
    packed = pack(jnp.asarray(codes), "ternary2")
    scales = jnp.asarray([0.5, -2.0, 0.25])
    x, g = float_rows(m, k, "bfloat16"), float_rows(m, n, "bfloat16")

    @jax.jit
    def every_layer(packed: jax.Array) -> Any:
        def one(_: None, layer: jax.Array) -> Any:
            weight = TernaryWeight(packed, scales, layer, k)
            return None, (
                triton.linear(x, (weight, weight)),
                triton.linear_transposed((g,), (weight,)),
                triton.matmul(jnp.ones((m, k), jnp.int8), weight),
            )

        return jax.lax.scan(one, None, jnp.arange(layers))[1]

    (y, again), dx, sums = every_layer(packed)
    np.testing.assert_array_equal(y, again)
    np.testing.assert_array_equal(sums[:, 0], codes.sum(axis=-1, dtype=np.int64))
    for layer in range(layers):
        alone = TernaryWeight(packed[layer], scales[layer], None, k)
        np.testing.assert_allclose(
            rows_of(y[layer]), rows_of(xla.linear(x, (alone,))[0]), rtol=2.0**-7
        )
        expected = float(scales[layer]) * (rows_of(g) @ codes[layer])
        assert relative(dx[layer], expected) < 5e-3


def test_few_tokens_are_quantised_bit_for_bit() -> None:
    """Ties, rows of many magnitudes, zeros: the codes and scales of ``absmax_quantize``."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((7, 301)) * np.exp2(rng.integers(-30, 30, (7, 1)))
    x[0] = np.linspace(-127, 127, 301).round() / 2
    x[1] = 0
    x = jnp.asarray(x.astype(np.float32)).astype(jnp.bfloat16)
    eye = weight_of(np.eye(301, dtype=np.int8))
    eye = TernaryWeight(eye.packed, jnp.float32(1), None, 301)
    (few,) = jax.jit(triton.linear)(x.astype(jnp.float32), (eye,))
    (many,) = jax.jit(xla.linear)(x.astype(jnp.float32), (eye,))
    np.testing.assert_allclose(few, many, rtol=1e-6, atol=0)


def test_what_is_not_finite_stays_visible() -> None:
    for m in (4, 20):
        x = float_rows(m, 36, "float32").at[0, 5].set(jnp.nan).at[2, 7].set(-jnp.inf)
        (y,) = jax.jit(triton.linear)(x, (weight_of(codes_of(10, 36)),))
        bad = np.isin(np.arange(m), [0, 2])
        assert np.all(np.isnan(np.asarray(y)[bad]))
        assert np.all(np.isfinite(np.asarray(y)[~bad]))


def test_other_floats_are_refused() -> None:
    weight = weight_of(codes_of(4, 8))
    for call in (partial(triton.matmul, weight=weight), partial(triton.matmul_transposed)):
        with pytest.raises(TypeError, match="found float8_e4m3fn"):
            call(jnp.ones((2, 8), jnp.float8_e4m3fn), weight=weight)


# ---- lowering, which needs no GPU --------------------------------------------------------------


def shape(dims: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def abstract_weight(n: int, k: int, packing: Packing) -> Any:
    packed = shape((3, n, -(-k // (4 if packing == "ternary2" else 5))), jnp.uint8)
    return TernaryWeight(
        packed,  # type: ignore[arg-type]
        shape((3,), jnp.float32),  # type: ignore[arg-type]
        shape((), jnp.int32),  # type: ignore[arg-type]
        k,
        packing,
    )


def imagined(platform: str) -> Any:
    """From 0.11 on, JAX has to be told of a GPU to lower for, if it has none."""
    if ON_GPU or jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    kind = "NVIDIA H100 80GB HBM3" if platform == "cuda" else "gfx942"
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh(
        (1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=device
    )
    return jax.sharding.use_abstract_mesh(mesh)


def lowered(function: Any, *arguments: Any, platform: str) -> str:
    with imagined(platform):
        traced = jax.jit(function).trace(*arguments)
        return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("m", [1, 8, 64, 2048])
@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_lowers_without_a_copy_of_the_stack(platform: str, m: int, packing: Packing) -> None:
    if ON_GPU and platform != jax.devices()[0].platform.replace("gpu", "cuda"):
        pytest.skip("a GPU lowers for itself")
    weights = (abstract_weight(768, 512, packing), abstract_weight(260, 512, packing))
    x = shape((m, 512), jnp.bfloat16)
    gradients = tuple(shape((m, w.n), jnp.bfloat16) for w in weights)
    forward = lowered(triton.linear, x, weights, platform=platform)
    backward = lowered(triton.linear_transposed, gradients, weights, platform=platform)
    few = m <= triton.FEW_TOKENS and packing == "ternary2"
    # Few tokens: one launch for both matrices. More: a quantiser, where it rounds as it should.
    assert forward.count("xla.gpu.triton") == (1 if few or platform == "rocm" else 2)
    assert backward.count("xla.gpu.triton") == 2
    for text in (forward, backward):
        sliced = [line for line in text.splitlines() if "slice" in line and "ui8" in line]
        assert not sliced
    assert ("dp4a" in forward) <= (platform == "cuda")


# ---- the backend is deprecated -----------------------------------------------------------------


def test_no_warning_reaches_strict_callers() -> None:
    """Not even where a program is lowered later than it was traced."""
    x, weight = jnp.ones((2, 13), jnp.int8), weight_of(codes_of(3, 13))
    traced = jax.jit(triton.matmul).trace(x, weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.block_until_ready(traced.lower().compile()(x, weight))
        with triton_call.without_deprecation():
            warnings.warn("The Pallas Triton backend is going", DeprecationWarning, stacklevel=1)
            with pytest.raises(DeprecationWarning, match="something else"):
                warnings.warn("something else", DeprecationWarning, stacklevel=1)


def test_vmap() -> None:
    x, codes = int8_rows(6, 20), codes_of(5, 20)
    run = jax.jit(jax.vmap(triton.matmul, in_axes=(0, None)))
    found = run(jnp.asarray(x).reshape(3, 2, 20), weight_of(codes))
    np.testing.assert_array_equal(found.reshape(6, 5), exact(x, codes))


def test_a_jax_without_pallas_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def importer(name: str, *rest: Any) -> Any:
        if name == "jax.experimental.pallas" and rest[2] and "triton" in rest[2]:
            raise ImportError("no module named jax.experimental.pallas.triton")
        return real(name, *rest)

    for name in list(sys.modules):
        if "triton_kernels" in name:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", importer)
    with pytest.raises(NotImplementedError, match="no Pallas Triton; use implementation xla or"):
        triton.matmul(jnp.ones((2, 8), jnp.int8), weight_of(codes_of(4, 8)))


# ---- gates and norms on the way ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gated", [None, "silu", "relu2"])
@pytest.mark.parametrize("normed", [True, False])
def test_prologue(gated: Any, normed: bool, dtype: str) -> None:
    """Equal to the steps one by one, but for codes at a tie.

    XLA may leave out roundings to bfloat16 between steps, which are about as coarse as codes.
    """
    m, k = 2, 301
    eye = np.eye(k, dtype=np.int8)
    weight = TernaryWeight(pack(jnp.asarray(eye), "ternary2"), jnp.float32(1), None, k)
    x, gate = float_rows(m, k, dtype), float_rows(m, k, dtype, seed=3)
    gain = float_rows(1, k, dtype, seed=4)[0]
    prologue = Prologue(
        gate=None if gated is None else gate,
        activation=gated,
        gain=gain if normed else None,
        eps=1e-5,
    )

    def run(implementation: Any) -> np.ndarray:
        call = partial(ternary_linear, implementation=implementation)
        return rows_of(jax.jit(lambda x, p: call(x, (weight,), prologue=p))(x, prologue)[0])

    found, expected = run("triton"), run("xla")
    step = np.max(np.abs(expected), axis=-1, keepdims=True) / 127
    most, often = (1.1, 0.02) if dtype == "float32" else (2.1, 0.3)
    assert np.max(np.abs(found - expected) / step) < most
    assert np.mean(np.abs(found - expected) > 0.05 * step) < often


def test_gradient_through_a_prologue() -> None:
    k = 60
    weight = weight_of(codes_of(12, k))
    x, gate, gain = (float_rows(1, k, "float32", seed) for seed in (2, 3, 4))

    def loss(implementation: Any, x: jax.Array, gate: jax.Array, gain: jax.Array) -> jax.Array:
        prologue = Prologue(gate=gate, activation="silu", gain=gain[0], eps=1e-5)
        (y,) = ternary_linear(x, (weight,), prologue=prologue, implementation=implementation)
        return jnp.sum(y * jnp.cos(jnp.arange(12.0))[None])

    found, expected = (
        jax.grad(partial(loss, name), (0, 1, 2))(x, gate, gain) for name in ("triton", "xla")
    )
    for ours, reference in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("gated", ["silu", "relu2"])
def test_a_prologue_lowers_into_the_product(gated: Any, dtype: str) -> None:
    weights = (abstract_weight(768, 512, "ternary2"),)
    x, gain = shape((1, 512), dtype), shape((512,), dtype)

    def run(x: Any, gate: Any, gain: Any, weights: Any) -> Any:
        prologue = Prologue(gate=gate, activation=gated, gain=gain, eps=1e-5)
        return ternary_linear(x, weights, prologue=prologue, implementation="triton")

    text = lowered(run, x, x, gain, weights, platform="cuda")
    assert text.count("xla.gpu.triton") == 1
    assert "stablehlo.rsqrt" not in text
