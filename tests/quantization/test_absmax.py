"""Activation quantisers against the released code, float64, and a transcription of ggml's rule."""

from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fabric_jax.quantization.absmax import (
    absmax_fake_quantize,
    absmax_quantize,
    block256_fake_quantize,
)

FLOATS = st.floats(-1e4, 1e4, width=32)
ROWS = hnp.arrays(np.float32, (6, 16), elements=FLOATS)


def ties() -> np.ndarray:
    """Rows with the largest element 127·2^j, so that the scale is 2^-j and k + 1/2 is exact."""
    k = np.arange(-63, 64, dtype=np.float32)
    row = np.concatenate([[127.0], k + 0.5, k - 0.5, [-127.0]]).astype(np.float32)
    return np.stack([row * np.float32(2.0**j) for j in (-9, -1, 0, 3, 8)])


def special_rows() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    outlier = random.standard_normal((5, 64)).astype(np.float32)
    outlier[np.arange(5), np.arange(5)] = [1e4, -1e8, 1e20, -5e37, 1e30]
    return {
        "zeros": np.zeros((3, 64), np.float32),
        "below-epsilon": (random.standard_normal((7, 64)) * 1e-6).astype(np.float32),
        "far-below-epsilon": (random.standard_normal((7, 64)) * 1e-30).astype(np.float32),
        "at-epsilon": np.full((2, 64), np.float32(1e-5)),
        "outlier": outlier,
        "ties": ties(),
        "gaussian": random.standard_normal((64, 2560)).astype(np.float32),
        "one-column": random.standard_normal((9, 1)).astype(np.float32),
        "three-axes": random.standard_normal((2, 3, 48)).astype(np.float32),
    }


SPECIAL = special_rows()


def numpy_codes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Section 1.2 of the arithmetic in numpy: float32 roundings where the rule has them."""
    one, top = np.float32(1), np.float32(127)
    largest = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-5))
    scale = ((one / largest) * top).astype(np.float32)
    return np.clip(np.rint(x * scale), -128, 127).astype(np.int8), scale


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", SPECIAL)
def test_codes_and_scales_equal_numpy(name: str, compiled: bool) -> None:
    x = SPECIAL[name]
    quantize = jax.jit(absmax_quantize) if compiled else absmax_quantize
    codes, scale = quantize(jnp.asarray(x))
    expected_codes, expected_scale = numpy_codes(x)
    assert codes.dtype == jnp.int8
    assert scale.shape == (*x.shape[:-1], 1)
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_array_equal(scale, expected_scale)


@pytest.mark.oracle
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", SPECIAL)
def test_codes_equal_transformers(
    name: str, compiled: bool, oracle: Callable[..., list[ModuleType]]
) -> None:
    torch, bitnet = oracle("torch", "transformers.integrations.bitnet")
    x = SPECIAL[name]
    packed_form = bitnet.BitLinear(x.shape[-1], 4, False, dtype=torch.float32)
    expected_codes, expected_scale = packed_form.activation_quant(torch.from_numpy(x))
    quantize = jax.jit(absmax_quantize) if compiled else absmax_quantize
    codes, scale = quantize(jnp.asarray(x))
    np.testing.assert_array_equal(codes, expected_codes.numpy())
    np.testing.assert_array_equal(scale, expected_scale.numpy())
    values = bitnet.ActQuant.apply(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(absmax_fake_quantize(jnp.asarray(x)), values, rtol=1e-6, atol=0)


@given(ROWS)
@settings(max_examples=150, deadline=None)
def test_codes_equal_numpy_for_any_rows(x: np.ndarray) -> None:
    codes, scale = absmax_quantize(jnp.asarray(x))
    expected_codes, expected_scale = numpy_codes(x)
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_array_equal(scale, expected_scale)


@given(ROWS)
@settings(max_examples=60, deadline=None)
def test_codes_are_within_half_a_step_of_exact_arithmetic(x: np.ndarray) -> None:
    codes, scale = absmax_quantize(jnp.asarray(x))
    exact = x.astype(np.float64)
    step = np.maximum(np.abs(exact).max(-1, keepdims=True), 1e-5) / 127
    assert np.all(np.abs(np.asarray(codes)) <= 127)
    np.testing.assert_allclose(1 / np.asarray(scale, np.float64), step, rtol=3e-7)
    assert np.all(np.abs(np.asarray(codes) - exact / step) <= 0.5 + 1e-4)


def test_ties_go_to_even() -> None:
    x = jnp.asarray([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert absmax_quantize(x)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2]]


def test_true_division_would_give_other_scales() -> None:
    """The two roundings matter: the test above would notice ``127 / m``."""
    x = SPECIAL["gaussian"]
    _, scale = absmax_quantize(jnp.asarray(x))
    other = np.float32(127) / np.abs(x).max(-1, keepdims=True)
    assert 0 < np.mean(np.asarray(scale) != other) < 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_quantised_in_float32(dtype: str) -> None:
    x = jnp.asarray(SPECIAL["gaussian"][:4], dtype)
    codes, scale = absmax_quantize(x)
    expected_codes, expected_scale = numpy_codes(np.asarray(x, np.float32))
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_array_equal(scale, expected_scale)
    values = absmax_fake_quantize(x)
    assert values.dtype == dtype
    exact = np.asarray(codes, np.float64) / np.asarray(scale, np.float64)
    np.testing.assert_allclose(np.asarray(values, np.float64), exact, rtol=2**-8)


def ggml_q8_k(row: np.ndarray) -> np.ndarray:
    """``quantize_row_q8_K`` and its inverse on one row, block by block, in float32.

    Where ggml's reciprocal overflows (its result is undefined then), zero is the right answer.
    """
    out = np.zeros_like(row)
    for start in range(0, row.size, 256):
        block = row[start : start + 256]
        amax, signed = np.float32(0), np.float32(0)
        for value in block:
            if abs(value) > amax:
                amax, signed = abs(value), value
        if amax < 1e-35:
            continue
        inverse = np.float32(-127) / signed
        codes = np.minimum(127, np.rint(inverse * block))
        out[start : start + 256] = (np.float32(1) / inverse) * codes.astype(np.float32)
    return out


def q8_k_rows() -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    tied = np.zeros(256, np.float32)
    tied[[3, 200]] = [2.0, -2.0]
    tied[10:20] = np.linspace(-2, 2, 10)
    half_zero = random.standard_normal(512).astype(np.float32)
    half_zero[:256] = 0
    return {
        "one-block": random.standard_normal(256).astype(np.float32),
        "three-blocks": random.standard_normal(768).astype(np.float32) * np.float32(40),
        "short-last-block": random.standard_normal(300).astype(np.float32),
        "shorter-than-a-block": random.standard_normal(10).astype(np.float32),
        "zero-block": half_zero,
        "negative-largest": -np.abs(random.standard_normal(256)).astype(np.float32),
        "equal-magnitudes-take-the-first": tied,
        "tiny": (random.standard_normal(256) * 1e-30).astype(np.float32),
        "huge": (random.standard_normal(256) * 1e30).astype(np.float32),
    }


Q8_K = q8_k_rows()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", Q8_K)
def test_block256_equals_a_transcription_of_ggml(name: str, compiled: bool) -> None:
    row = Q8_K[name]
    fake = jax.jit(block256_fake_quantize) if compiled else block256_fake_quantize
    found = np.asarray(fake(jnp.stack([jnp.asarray(row), jnp.asarray(row[::-1])])))
    for values, source in zip(found, (row, row[::-1]), strict=True):
        np.testing.assert_allclose(values, ggml_q8_k(source), rtol=3e-7, atol=0)


@given(hnp.arrays(np.float32, (2, 260), elements=FLOATS))
@settings(max_examples=40, deadline=None)
def test_block256_equals_a_transcription_of_ggml_for_any_rows(x: np.ndarray) -> None:
    found = np.asarray(block256_fake_quantize(jnp.asarray(x)))
    for values, source in zip(found, x, strict=True):
        np.testing.assert_allclose(values, ggml_q8_k(source), rtol=3e-7, atol=0)


@pytest.mark.parametrize("magnitude", [1e-38, 3e-37, 2e-36])
def test_block256_of_almost_nothing_stays_finite(magnitude: float) -> None:
    """127 / 1e-38 overflows; such blocks (dead channels make them) must not become NaN."""
    row = np.zeros((1, 256), np.float32)
    row[0, 7] = magnitude
    values = np.asarray(block256_fake_quantize(jnp.asarray(row)))
    assert np.all(np.isfinite(values))
    np.testing.assert_allclose(values, row, atol=1e-35)


def test_block256_of_leading_axes() -> None:
    x = np.random.default_rng(6).standard_normal((2, 3, 513)).astype(np.float32)
    found = np.asarray(block256_fake_quantize(jnp.asarray(x)))
    expected = np.stack([ggml_q8_k(row) for row in x.reshape(-1, 513)]).reshape(x.shape)
    np.testing.assert_allclose(found, expected, rtol=3e-7, atol=0)
