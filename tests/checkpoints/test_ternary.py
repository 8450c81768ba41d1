import numpy as np
import pytest
from fabric_kernels import pack_ternary2
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric_jax.checkpoints import ternary
from fabric_jax.errors import FabricError
from tests.checkpoints.hf_folder import quarter_rows

SHAPES = st.tuples(st.integers(1, 13), st.integers(1, 23))


def codes_of(shape, seed=0):
    return np.random.default_rng(seed).integers(-1, 2, shape).astype(np.int8)


def test_worked_example():
    """Eight rows of one column; bits of rows 0, 2, 4, 6 and of 1, 3, 5, 7 share bytes."""
    codes = np.array([-1, 0, 1, 0, 1, -1, 0, 1], np.int8)[:, None]
    quarters = np.array([[104], [133]], np.uint8)
    np.testing.assert_array_equal(quarter_rows(codes), quarters)
    packed = ternary.from_quarter_rows(quarters, 8)
    np.testing.assert_array_equal(packed, pack_ternary2(codes))
    np.testing.assert_array_equal(ternary.to_quarter_rows(packed, 1), quarters)


@settings(deadline=None, max_examples=60)
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_layouts_of_any_shape(shape, seed):
    n, k = shape
    codes = codes_of(shape, seed)
    packed = ternary.pack_codes(codes)
    np.testing.assert_array_equal(ternary.unpack_codes(packed, k), codes)
    quarters = quarter_rows(codes)
    np.testing.assert_array_equal(ternary.from_quarter_rows(quarters, n), packed)
    np.testing.assert_array_equal(ternary.to_quarter_rows(packed, k), quarters)
    assert ternary.is_packed(packed)


@pytest.mark.parametrize("shape", [(5, 8), (1030, 1023), (64, 40_000)])
def test_the_layout_is_that_of_the_kernels(shape):
    """Shapes of several blocks too."""
    codes = codes_of(shape)
    packed = ternary.pack_codes(codes)
    np.testing.assert_array_equal(packed, pack_ternary2(codes))
    again = ternary.from_quarter_rows(ternary.to_quarter_rows(packed, shape[1]), shape[0])
    np.testing.assert_array_equal(again, packed)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.int8])
def test_codes_of_any_type(dtype):
    codes = codes_of((7, 9))
    np.testing.assert_array_equal(
        ternary.pack_codes(codes.astype(dtype)), ternary.pack_codes(codes)
    )


@pytest.mark.parametrize("value", [2, -2, 0.5, 256, np.nan, np.inf, 1e30])
def test_values_that_are_no_codes(value):
    codes = codes_of((7, 9)).astype(np.float32)
    codes[6, 8] = value
    with pytest.raises(FabricError, match="no ternary codes"):
        ternary.pack_codes(codes)


@pytest.mark.parametrize("place", [0, 2, 4, 6])
@pytest.mark.parametrize("where", [(0, 0), (1029, 1022), (700, 3)])
def test_the_fourth_value_of_a_field(where, place):
    packed = np.full((1030, 1023), ternary.CODE_ZERO, np.uint8)
    assert ternary.is_packed(packed)
    ternary.from_quarter_rows(packed, 4120)
    packed[where] |= np.uint8(3 << place)
    assert not ternary.is_packed(packed)
    with pytest.raises(FabricError, match="no packed ternary codes"):
        ternary.from_quarter_rows(packed, 4120)


def test_dequantised():
    codes = codes_of((5, 6))
    found = ternary.dequantize(ternary.pack_codes(codes), 0.3, 6)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, codes * np.float32(0.3))
