"""The weight quantiser against the released code and float64."""

from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fabric_jax.quantization.absmean import absmean_fake_quantize, absmean_quantize, absmean_scale


def special_weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    gaussian = random.standard_normal((96, 160)).astype(np.float32)
    outlier = gaussian.copy()
    outlier[3, 5] = 1e6
    zero_rows = gaussian.copy()
    zero_rows[::2] = 0
    # Half ones and half zeros has the mean 1/2, so 0.25 and 0.75 lie exactly between codes.
    ties = np.tile(np.float32([0.25, -0.25, 0.75, -0.75, 0.5, 0.5, 0.5, 0.5]), (8, 4))
    return {
        "gaussian": gaussian,
        "small": gaussian * np.float32(0.02),
        "zeros": np.zeros((4, 8), np.float32),
        "below-epsilon": gaussian * np.float32(1e-7),
        "dead-channels": gaussian * np.where(np.arange(160) % 3, 1, 1e-34).astype(np.float32),
        "zero-rows": zero_rows,
        "outlier": outlier,
        "ties": ties,
        "one-element": np.float32([[0.3]]),
    }


SPECIAL = special_weights()


def exact_codes(weight: np.ndarray) -> tuple[np.ndarray, float]:
    """Section 1.1 in float64."""
    wide = weight.astype(np.float64)
    scale = max(float(np.mean(np.abs(wide))), float(np.float32(1e-5)))
    return np.clip(np.rint(wide / scale), -1, 1).astype(np.int8), scale


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", SPECIAL)
def test_codes_and_scale_equal_float64(name: str, compiled: bool) -> None:
    weight = SPECIAL[name]
    quantize = jax.jit(absmean_quantize) if compiled else absmean_quantize
    codes, scale = quantize(jnp.asarray(weight))
    expected_codes, expected_scale = exact_codes(weight)
    assert codes.dtype == jnp.int8
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_allclose(scale, expected_scale, rtol=4e-7)
    np.testing.assert_allclose(absmean_scale(jnp.asarray(weight)), expected_scale, rtol=4e-7)


@pytest.mark.oracle
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", SPECIAL)
def test_codes_equal_transformers(
    name: str, compiled: bool, oracle: Callable[..., list[ModuleType]]
) -> None:
    torch, bitnet = oracle("torch", "transformers.integrations.bitnet")
    weight = SPECIAL[name]
    values = bitnet.WeightQuant.apply(torch.from_numpy(weight)).numpy()
    quantize = jax.jit(absmean_quantize) if compiled else absmean_quantize
    codes, scale = quantize(jnp.asarray(weight))
    np.testing.assert_array_equal(codes, np.sign(values))
    np.testing.assert_allclose(absmean_fake_quantize(jnp.asarray(weight)), values, rtol=4e-7)
    if np.any(values):
        np.testing.assert_allclose(scale, np.abs(values).max(), rtol=4e-7)


@given(hnp.arrays(np.float32, (8, 16), elements=st.floats(-100, 100, width=32)))
@settings(max_examples=100, deadline=None)
def test_codes_equal_float64_away_from_ties(weight: np.ndarray) -> None:
    codes, scale = absmean_quantize(jnp.asarray(weight))
    expected_codes, expected_scale = exact_codes(weight)
    np.testing.assert_allclose(scale, expected_scale, rtol=1e-5)
    ratio = np.abs(weight.astype(np.float64)) / expected_scale
    clear = np.abs(ratio - 0.5) > 1e-5
    np.testing.assert_array_equal(np.asarray(codes)[clear], expected_codes[clear])


def test_ties_go_to_even() -> None:
    codes, scale = absmean_quantize(jnp.asarray(SPECIAL["ties"]))
    assert float(scale) == 0.5
    assert codes[0, :8].tolist() == [0, 0, 1, -1, 1, 1, 1, 1]


def test_quantising_twice_shrinks_the_scale_by_the_share_of_non_zeros() -> None:
    codes, scale = absmean_quantize(jnp.asarray(SPECIAL["gaussian"]))
    again, shrunk = absmean_quantize(codes.astype(jnp.float32) * scale)
    np.testing.assert_array_equal(again, codes)
    share = np.mean(np.asarray(codes) != 0)
    np.testing.assert_allclose(shrunk, float(scale) * share, rtol=1e-6)
    assert share < 0.75


def test_bfloat16_weights_are_quantised_in_float32() -> None:
    weight = jnp.asarray(SPECIAL["small"], jnp.bfloat16)
    codes, scale = absmean_quantize(weight)
    expected_codes, expected_scale = exact_codes(np.asarray(weight, np.float32))
    np.testing.assert_array_equal(codes, expected_codes)
    assert scale.dtype == jnp.float32
    np.testing.assert_allclose(scale, expected_scale, rtol=4e-7)
    assert absmean_fake_quantize(weight).dtype == jnp.bfloat16


def test_fake_quantised_values_are_exactly_three() -> None:
    values = np.asarray(absmean_fake_quantize(jnp.asarray(SPECIAL["gaussian"])))
    largest = values.max()
    assert set(np.unique(values)) == {-largest, np.float32(0), largest}
