"""The ternary2 layout: round trip, bit positions, bytes counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import bits_per_weight, pack_ternary2, packed_width, unpack_ternary2
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

CODES = hnp.arrays(
    np.int8,
    hnp.array_shapes(min_dims=1, max_dims=3, max_side=13),
    elements=st.integers(-1, 1),
)


def pack_by_bits(codes: np.ndarray) -> np.ndarray:
    """The layout re-derived one code at a time, from the diagram alone."""
    *stack, k = codes.shape
    packed = np.zeros((*stack, (k + 3) // 4), np.uint8)
    for index in np.ndindex(*stack):
        for byte in range(packed.shape[-1]):
            value = 0
            for field in range(4):
                column = 4 * byte + field
                code = int(codes[(*index, column)]) if column < k else 0
                value |= (code + 1) << (2 * field)
            packed[(*index, byte)] = value
    return packed


@given(CODES)
@settings(max_examples=15, deadline=None)
def test_unpacking_inverts_packing_for_any_shape(codes: np.ndarray) -> None:
    packed = pack_ternary2(jnp.asarray(codes))
    assert packed.dtype == jnp.uint8
    assert packed.shape == (*codes.shape[:-1], packed_width(codes.shape[-1]))
    unpacked = unpack_ternary2(packed, codes.shape[-1])
    assert unpacked.dtype == jnp.int8
    np.testing.assert_array_equal(unpacked, codes)


@given(CODES)
@settings(max_examples=15, deadline=None)
def test_bytes_equal_a_bit_by_bit_derivation(codes: np.ndarray) -> None:
    np.testing.assert_array_equal(pack_ternary2(jnp.asarray(codes)), pack_by_bits(codes))


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        pytest.param([-1, -1, -1, -1], [0b00_00_00_00], id="all-minus"),
        pytest.param([1, 1, 1, 1], [0b10_10_10_10], id="all-plus"),
        pytest.param([-1, 0, 1, 0], [0b01_10_01_00], id="first-code-in-lowest-bits"),
        pytest.param([1], [0b01_01_01_10], id="tail-is-code-0"),
        pytest.param([0, 1, -1, 1, -1, 1], [0b10_00_10_01, 0b01_01_10_00], id="two-bytes"),
    ],
)
def test_worked_bytes(codes: list[int], expected: list[int]) -> None:
    packed = pack_ternary2(jnp.asarray(codes, jnp.int8))
    assert packed.tolist() == expected


@pytest.mark.parametrize("dtype", ["int8", "int32", "bfloat16", "float16", "float32"])
def test_unpacks_to_any_dtype(dtype: str) -> None:
    codes = np.random.default_rng(0).integers(-1, 2, (5, 11)).astype(np.int8)
    unpacked = unpack_ternary2(pack_ternary2(jnp.asarray(codes)), 11, dtype)
    assert unpacked.dtype == dtype
    np.testing.assert_array_equal(unpacked.astype(jnp.int8), codes)


def test_layout_is_a_bitcast_to_uint2() -> None:
    codes = np.random.default_rng(1).integers(-1, 2, (3, 16)).astype(np.int8)
    packed = pack_ternary2(jnp.asarray(codes))
    fields = jax.lax.bitcast_convert_type(packed, jnp.uint2).reshape(3, 16)
    np.testing.assert_array_equal(fields.astype(jnp.int8) - jnp.int8(1), codes)


@pytest.mark.parametrize(("n", "k", "scale_bits"), [(1, 1, 32), (3, 7, 16), (5, 8, 0), (9, 39, 32)])
def test_bits_per_weight_counts_the_bytes_there_are(n: int, k: int, scale_bits: int) -> None:
    packed = pack_ternary2(jnp.zeros((n, k), jnp.int8))
    assert bits_per_weight(n, k, scale_bits) == (8 * packed.nbytes + scale_bits) / (n * k)


def test_large_matrices_cost_two_bits() -> None:
    assert 2.0 < bits_per_weight(2560, 6912) < 2.00001


def test_packs_and_unpacks_under_jit_and_vmap() -> None:
    codes = np.random.default_rng(2).integers(-1, 2, (4, 6, 10)).astype(np.int8)
    packed = jax.jit(jax.vmap(pack_ternary2))(jnp.asarray(codes))
    np.testing.assert_array_equal(packed, pack_by_bits(codes))
    unpacked = jax.jit(jax.vmap(lambda p: unpack_ternary2(p, 10)))(packed)
    np.testing.assert_array_equal(unpacked, codes)


@pytest.mark.parametrize("k", [1, 4, 9, 13], ids=lambda k: f"k{k}")
def test_a_wrong_width_raises(k: int) -> None:
    with pytest.raises(ValueError, match=f"packed rows of {k} ternary weights have .* found 2"):
        unpack_ternary2(jnp.zeros((3, 2), jnp.uint8), k)
