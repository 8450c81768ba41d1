"""Attention and its gradients against numpy in float64."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import attention, cpu_library
from fabric_kernels.ternary_matmul import Implementation
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
Array = NDArray[np.float64]
# B, T, S, H, K, hd
SHAPES = [
    (1, 1, 1, 1, 1, 2),
    (2, 7, 7, 6, 2, 8),
    (3, 33, 50, 4, 1, 10),
    (2, 65, 65, 3, 3, 6),
    (1, 100, 100, 8, 2, 80),
    (1, 130, 130, 4, 1, 32),  # more than one chunk of queries for a key head
    (1, 48, 300, 2, 2, 64),
]
NAMES = ("out", "dq", "dk", "dv")


def floats(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def operands(shape: tuple[int, ...], seed: int = 0) -> list[np.ndarray]:
    """Queries, keys, values and a gradient by the output."""
    b, t, s, h, k, width = shape
    sizes = ((b, t, h, width), (b, s, k, width), (b, s, k, width), (b, t, h, width))
    return [floats(size, seed + i) for i, size in enumerate(sizes)]


def make_mask(kind: str, shape: tuple[int, ...]) -> np.ndarray:
    b, t, s = shape[:3]
    causal = np.tri(t, s, s - t, dtype=bool)
    if kind == "ragged":
        mask = np.random.default_rng(5).random((b, t, s)) < 0.4
        mask[:, t // 2] = False  # sees nothing
        return mask
    if kind == "segments":
        ids = np.sort(np.random.default_rng(6).integers(0, 3, (b, s)), -1)
        return causal & (ids[:, s - t :, None] == ids[:, None])
    if kind == "window":
        causal = causal & ~np.tri(t, s, s - t - 9, dtype=bool)
    return np.broadcast_to(causal, (b, t, s)).copy()


def exact(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray, mask: np.ndarray, scale: float
) -> tuple[Array, ...]:
    """The output and its gradients, in float64, from the definitions."""
    b, t, h, width = q.shape
    heads = (b, t, k.shape[2], h // k.shape[2], width)
    wide_q, wide_g = (x.astype(np.float64).reshape(heads) for x in (q, g))
    k, v = k.astype(np.float64), v.astype(np.float64)
    seen = np.broadcast_to(mask[:, None, None], (b, *heads[2:4], t, k.shape[1]))
    blind = ~seen.any(-1, keepdims=True)
    scores = np.einsum("btkgd,bskd->bkgts", wide_q, k) * scale
    scores = np.where(blind, 0, np.where(seen, scores, -np.inf))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bkgts,bskd->btkgd", weights, v).reshape(q.shape)
    dv = np.einsum("bkgts,btkgd->bskd", weights, wide_g)
    slopes = np.einsum("btkgd,bskd->bkgts", wide_g, v)
    slopes = weights * (slopes - (weights * slopes).sum(-1, keepdims=True)) * scale
    slopes = np.where(blind, 0, slopes)
    dq = np.einsum("bkgts,bskd->btkgd", slopes, k).reshape(q.shape)
    return out, dq, np.einsum("bkgts,btkgd->bskd", slopes, wide_q), dv


def exact_rotation(x: np.ndarray, angles: np.ndarray) -> Array:
    """Channels i and i + hd/2 of [B, T, heads, hd] as complex numbers, turned by [B, T, hd/2]."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, :, None]
    return np.concatenate([turned.real, turned.imag], -1)


def assert_close(found: object, expected: Array, name: str, bound: float = 2e-6) -> None:
    largest = max(float(np.abs(expected).max(initial=0)), 1e-3)
    error = np.abs(np.asarray(found, np.float64) - expected).max(initial=0) / largest
    assert error <= bound, f"{name}: {error:.1e}"


@pytest.mark.parametrize("kind", ["causal", "ragged", "segments", "window"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(
    shape: tuple[int, ...], kind: str, implementation: Implementation
) -> None:
    q, k, v, g = operands(shape)
    mask = make_mask(kind, shape)

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        call = partial(attention, mask=jnp.asarray(mask), scale=0.3, implementation=implementation)
        out, transpose = jax.vjp(call, q, k, v)
        return out, *transpose(jnp.asarray(g))

    for name, found, expected in zip(
        NAMES, run(q, k, v), exact(q, k, v, g, mask, 0.3), strict=True
    ):
        assert found.dtype == jnp.float32
        assert_close(found, expected, name)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[5]], ids=str)
def test_angles_turn_queries_and_keys(
    shape: tuple[int, ...], implementation: Implementation
) -> None:
    q, k, v, g = operands(shape)
    mask = make_mask("causal", shape)
    angles = 3 * floats((shape[0], shape[1], shape[-1] // 2), 9)
    call = partial(
        attention,
        mask=jnp.asarray(mask),
        angles=(jnp.cos(angles), jnp.sin(angles)),
        implementation=implementation,
    )

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        out, transpose = jax.vjp(call, q, k, v)
        return out, *transpose(jnp.asarray(g))

    expected, dq, dk, dv = exact(
        exact_rotation(q, angles), exact_rotation(k, angles), v, g, mask, shape[-1] ** -0.5
    )
    # The transpose of a turn is the turn back.
    dq, dk = exact_rotation(dq, -angles), exact_rotation(dk, -angles)
    for name, one, other in zip(NAMES, run(q, k, v), (expected, dq, dk, dv), strict=True):
        assert_close(one, other, name)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("size", [30.0, 1e4])
def test_large_scores(size: float) -> None:
    """Up to 1e9: nothing overflows, and a query's weight falls on few keys or one."""
    shape = (1, 40, 40, 2, 1, 16)
    q, k, v, g = operands(shape)
    q, k, mask = q * size, k * size, make_mask("causal", shape)
    call = partial(attention, mask=jnp.asarray(mask), implementation="cpu")
    out, transpose = jax.vjp(call, q, k, v)
    found = (out, *transpose(jnp.asarray(g)))
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in found)
    # Scores of float32 are 6e-8 of their size off.
    bound = 2e-6 + 2e-7 * 4 * size**2
    if bound < 1e-2:
        for name, one, other in zip(NAMES, found, exact(q, k, v, g, mask, 0.25), strict=True):
            assert_close(one, other, name, bound)


@pytest.mark.usefixtures("cpu_kernels")
def test_what_is_hidden_has_no_part() -> None:
    """Neither its size, bit for bit, nor a gradient; a NaN that is seen is not lost."""
    shape = (1, 50, 50, 2, 1, 8)
    q, k, v, g = operands(shape)
    mask = make_mask("causal", shape)
    mask[:, :, 20] = False
    call = partial(attention, mask=jnp.asarray(mask), implementation="cpu")

    def run(k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, ...]:
        out, transpose = jax.vjp(call, q, k, v)
        return tuple(np.asarray(x) for x in (out, *transpose(jnp.asarray(g))))

    out, dq, dk, dv = run(k, v)
    assert not dk[:, 20].any()
    assert not dv[:, 20].any()
    other_k, other_v = k.copy(), v.copy()
    other_k[:, 20] += 3
    other_v[:, 20] = 1e6
    for one, other in zip((out, dq, dk, dv), run(other_k, other_v), strict=True):
        np.testing.assert_array_equal(one, other)
    other_k[:, 30] = np.nan
    broken = np.isnan(np.sum(run(other_k, v)[0], (0, 2, 3)))
    np.testing.assert_array_equal(broken, np.arange(50) >= 30)


@pytest.mark.usefixtures("cpu_kernels")
def test_scan_checkpoint_and_vmap() -> None:
    """Layers that are rematerialised in a scan, over a mapped axis, against the same in XLA."""
    shape = (2, 12, 12, 4, 2, 8)
    q, k, v, _ = (jnp.asarray(x) for x in operands(shape))
    mask = jnp.asarray(make_mask("segments", shape))
    weights = jnp.asarray(floats((3, 8, 8), 7))

    def loss(weights: jax.Array, q: jax.Array, implementation: Implementation) -> jax.Array:
        @jax.checkpoint
        def layer(h: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
            return h + attention(h @ weight, k, v, mask, implementation=implementation), None

        return jnp.sum(jax.lax.scan(layer, q, weights)[0] ** 2)

    mapped = jnp.stack([q, 2 * q, -q])
    found, expected = (
        jax.jit(jax.vmap(jax.grad(partial(loss, implementation=name), (0, 1)), (None, 0)))(
            weights, mapped
        )
        for name in ("cpu", "xla")
    )
    for one, other in zip(found, expected, strict=True):
        assert_close(one, np.asarray(other, np.float64), "gradient", 1e-5)


@pytest.mark.usefixtures("cpu_kernels")
def test_half_precision_is_computed_in_float32() -> None:
    shape = SHAPES[1]
    q, k, v, g = (jnp.asarray(x, jnp.bfloat16) for x in operands(shape))
    mask = make_mask("causal", shape)
    call = partial(attention, mask=jnp.asarray(mask), implementation="cpu")
    out, transpose = jax.vjp(call, q, k, v)
    wide_q, wide_k, wide_v, wide_g = (np.asarray(x, np.float32) for x in (q, k, v, g))
    expected = exact(wide_q, wide_k, wide_v, wide_g, mask, shape[-1] ** -0.5)
    for name, one, other in zip(NAMES, (out, *transpose(g)), expected, strict=True):
        assert one.dtype == jnp.bfloat16
        assert_close(one, other, name, 2**-8)


def test_what_does_not_fit_is_refused() -> None:
    q, k, v, _ = (jnp.asarray(x) for x in operands(SHAPES[1]))
    mask = jnp.ones((2, 7, 7), bool)
    with pytest.raises(TypeError, match="the mask of attention is bool, found float32"):
        attention(q, k, v, mask.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"K a divisor of 6; found \[2, 7, 4, 8\]"):
        attention(q, jnp.concatenate([k, k], 2), jnp.concatenate([v, v], 2), mask)
    with pytest.raises(ValueError, match=r"the mask must be \[2, 7, 7\], found \[1, 7, 7\]"):
        attention(q, k, v, mask[:1])
    angles = (jnp.ones((2, 7, 4)), jnp.ones((2, 7, 4)))
    with pytest.raises(ValueError, match="found 6 keys"):
        attention(q, k[:, :6], v[:, :6], mask[..., :6], angles=angles)
    with pytest.raises(ValueError, match="scale of attention must be positive, found -1"):
        attention(q, k, v, mask, scale=-1.0)
    with pytest.raises(ValueError, match="found 'abacus'"):
        attention(q, k, v, mask, implementation="abacus")  # type: ignore[arg-type]


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_other_instruction_sets(isa: str) -> None:
    """A process of its own runs the first test on one shape."""
    code = f"""
import sys
from fabric_kernels import cpu_library
status = cpu_library.status()
if status.library is None:
    sys.exit(3 if "not available" in status.problem else status.problem)
assert status.library.isa == "{isa}"
from tests.kernels.test_attention_kernel import SHAPES, test_output_and_gradients
test_output_and_gradients(SHAPES[4], "ragged", "cpu")
"""
    library = cpu_library.load()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
            "FABRIC_KERNELS_ISA": isa,
            "FABRIC_KERNELS_CACHE": str(Path(library.path).parent),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 3:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr
