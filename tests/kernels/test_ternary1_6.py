"""The ternary1.6 layout: every byte, GGUF's bytes, and exact products in both layouts."""

import itertools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import (
    Packing,
    bits_per_weight,
    pack,
    packed_width,
    repack,
    ternary_matmul,
    unpack,
)
from fabric_kernels import packing as packing_module
from fabric_kernels.ternary_matmul import Implementation
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.kernels.conftest import need_cpu_kernels

PACKING: Packing = "ternary1.6"
# One compilation for each shape.
jit_pack = jax.jit(pack, static_argnames="packing")
jit_unpack = jax.jit(unpack, static_argnames=("k", "packing"))
jit_matmul = jax.jit(ternary_matmul, static_argnames=("packing", "implementation"))
CODES = hnp.arrays(
    np.int8,
    hnp.array_shapes(min_dims=1, max_dims=3, max_side=13),
    elements=st.integers(-1, 1),
)


def pack_by_digits(codes: np.ndarray) -> np.ndarray:
    """The layout re-derived one code at a time, from the description alone."""
    *stack, k = codes.shape
    width = (k + 4) // 5
    packed = np.zeros((*stack, width), np.uint8)
    for index in np.ndindex(*stack):
        for i in range(width):
            columns = [i + j * width for j in range(5)]
            digits = [int(codes[(*index, c)]) + 1 if c < k else 1 for c in columns]
            value = sum(digit * 3 ** (4 - j) for j, digit in enumerate(digits))
            packed[(*index, i)] = -(-256 * value // 243)
    return packed


@given(CODES)
@settings(max_examples=12, deadline=None)
def test_unpacking_inverts_packing_for_any_shape(codes: np.ndarray) -> None:
    packed = jit_pack(jnp.asarray(codes), PACKING)
    assert packed.dtype == jnp.uint8
    assert packed.shape == (*codes.shape[:-1], packed_width(codes.shape[-1], PACKING))
    unpacked = jit_unpack(packed, codes.shape[-1], PACKING)
    assert unpacked.dtype == jnp.int8
    np.testing.assert_array_equal(unpacked, codes)


@given(CODES)
@settings(max_examples=12, deadline=None)
def test_bytes_equal_a_digit_by_digit_derivation(codes: np.ndarray) -> None:
    np.testing.assert_array_equal(jit_pack(jnp.asarray(codes), PACKING), pack_by_digits(codes))


@given(CODES, st.integers(1, 40))
@settings(max_examples=25, deadline=None)
@pytest.mark.slow
def test_repacking_is_packing_and_goes_back(codes: np.ndarray, block_codes: int) -> None:
    """In blocks of any size, a last one that overlaps included."""
    k = codes.shape[-1]
    one, other = (np.asarray(pack(jnp.asarray(codes), to)) for to in ("ternary2", "ternary1.6"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing_module, "REPACK_CODES", block_codes)
        there = repack(jnp.asarray(one), k, "ternary2", "ternary1.6")
        back = repack(there, k, "ternary1.6", "ternary2")
    assert there.dtype == back.dtype == jnp.uint8
    np.testing.assert_array_equal(there, other)
    np.testing.assert_array_equal(back, one)


def test_repacking_checks_the_width() -> None:
    with pytest.raises(ValueError, match=r"rows of 9 codes packed as ternary1.6 have 2 bytes"):
        repack(jnp.zeros((3, 3), jnp.uint8), 9, "ternary1.6", "ternary2")


def every_byte() -> np.ndarray:
    """[243, 5]: the five codes of each byte that a packer writes, in rising order of bytes."""
    return np.array(list(itertools.product((-1, 0, 1), repeat=5)), np.int8)


def test_every_byte_has_its_own_codes() -> None:
    codes = every_byte()
    packed = np.asarray(jit_pack(jnp.asarray(codes), PACKING))
    assert packed.shape == (243, 1)
    assert np.all(np.diff(packed[:, 0].astype(int)) >= 1)
    assert (packed[0, 0], packed[-1, 0]) == (0, 255)
    np.testing.assert_array_equal(jit_unpack(jnp.asarray(packed), 5, PACKING), codes)


def test_products_of_every_byte(implementation: Implementation) -> None:
    """One code at a time (of each digit and sign), then all: for one row, a few and many."""
    packed = jit_pack(jnp.asarray(every_byte()), PACKING)
    one_at_a_time = np.concatenate([np.eye(5), -128 * np.eye(5), np.full((1, 5), 127)])
    for x in (one_at_a_time, one_at_a_time[:4], *one_at_a_time[:5, None]):
        y = jit_matmul(
            jnp.asarray(x, jnp.int8), packed, packing=PACKING, implementation=implementation
        )
        np.testing.assert_array_equal(y, x.astype(int) @ every_byte().T.astype(int))


def test_bytes_are_those_of_gguf() -> None:
    """A TQ1_0 block of 256 codes: of the first 160 our row is the same 32 bytes."""
    quants = pytest.importorskip("gguf.quants")
    codes = np.random.default_rng(0).integers(-1, 2, (6, 256)).astype(np.int8)
    codes[:, 0] = 1  # a block's scale is its largest magnitude
    blocks = quants.quantize(codes.astype(np.float32), quants.GGMLQuantizationType.TQ1_0)
    ours = np.asarray(jit_pack(jnp.asarray(codes[:, :160]), PACKING))
    np.testing.assert_array_equal(blocks[:, :32], ours)
    # The next 80 are a row of 16 bytes.
    ours = np.asarray(jit_pack(jnp.asarray(codes[:, 160:240]), PACKING))
    np.testing.assert_array_equal(blocks[:, 32:48], ours)


@pytest.mark.parametrize("k", [1, 4, 5, 6, 11, 243])
def test_the_tail_is_code_0(k: int) -> None:
    """Reading past K gives zeros, so a kernel need not know where a row ends."""
    packed = jit_pack(jnp.ones((2, k), jnp.int8), PACKING)
    padded = jit_unpack(packed, 5 * packed.shape[-1], PACKING)
    np.testing.assert_array_equal(padded[:, :k], np.ones((2, k)))
    assert not np.any(padded[:, k:])


@pytest.mark.parametrize(
    ("n", "k", "scale_bits"), [(1, 1, 32), (3, 7, 16), (5, 10, 0), (9, 39, 32)]
)
def test_bits_per_weight_counts_the_bytes_there_are(n: int, k: int, scale_bits: int) -> None:
    packed = jit_pack(jnp.zeros((n, k), jnp.int8), PACKING)
    expected = (8 * packed.nbytes + scale_bits) / (n * k)
    assert bits_per_weight(n, k, scale_bits, PACKING) == expected


def test_large_matrices_cost_eight_fifths_of_a_bit() -> None:
    assert 1.6 < bits_per_weight(2560, 6910, packing=PACKING) < 1.60001


@pytest.mark.parametrize("dtype", ["int8", "int32", "bfloat16", "float32"])
def test_unpacks_to_any_dtype_under_jit_and_vmap(dtype: str) -> None:
    codes = np.random.default_rng(0).integers(-1, 2, (3, 5, 11)).astype(np.int8)
    packed = jax.jit(jax.vmap(lambda c: pack(c, PACKING)))(jnp.asarray(codes))
    unpacked = jax.jit(jax.vmap(lambda p: unpack(p, 11, PACKING, dtype)))(packed)
    assert unpacked.dtype == dtype
    np.testing.assert_array_equal(unpacked.astype(jnp.int8), codes)


def test_a_wrong_width_or_packing_raises() -> None:
    with pytest.raises(ValueError, match=r"rows of 11 codes packed as ternary1.6 have 3 bytes.* 2"):
        unpack(jnp.zeros((3, 2), jnp.uint8), 11, PACKING)
    unknown = cast(Any, "ternary3")
    for call in (
        lambda: pack(jnp.zeros((2, 5), jnp.int8), unknown),
        lambda: unpack(jnp.zeros((2, 1), jnp.uint8), 5, unknown),
        lambda: packed_width(5, unknown),
        lambda: ternary_matmul(jnp.zeros((2, 5)), jnp.zeros((2, 1), jnp.uint8), packing=unknown),
    ):
        with pytest.raises(
            ValueError, match=r"packings are ternary2, ternary1.6; found 'ternary3'"
        ):
            call()


# Rows of one byte to several vectors, with every remainder of K by 5 and N by 4.
SHAPES = [(1, 1), (3, 5), (7, 64), (33, 257), (129, 255), (64, 323), (5, 1029), (66, 321)]


@pytest.mark.parametrize("packing", ["ternary2", "ternary1.6"])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_integer_products_are_exact(
    n: int, k: int, packing: Packing, implementation: Implementation
) -> None:
    rng = np.random.default_rng(n)
    codes = rng.integers(-1, 2, (n, k)).astype(np.int8)
    packed = jit_pack(jnp.asarray(codes), packing)
    # One row, a few, and more than a tile: the kernels of each.
    for leading in ((), (3,), (2, 13)):
        x = rng.integers(-128, 128, (*leading, k)).astype(np.int8)
        y = jit_matmul(jnp.asarray(x), packed, packing=packing, implementation=implementation)
        assert y.dtype == jnp.int32
        np.testing.assert_array_equal(y, x.astype(np.int64) @ codes.T.astype(np.int64))


@pytest.mark.parametrize("packing", ["ternary2", "ternary1.6"])
@pytest.mark.parametrize("rows", [1, 5])
def test_rows_longer_than_any_lane_can_sum(packing: Packing, rows: int) -> None:
    """All products of one sign: what is summed before it is divided must not overflow."""
    k = (1 << 19) + 7
    codes = np.stack([np.ones(k), -np.ones(k)]).astype(np.int8)
    x = np.full((rows, k), -128, np.int8)
    packed = jit_pack(jnp.asarray(codes), packing)
    for implementation in ("xla", "cpu"):
        if implementation == "cpu":
            need_cpu_kernels()
        y = jit_matmul(jnp.asarray(x), packed, packing=packing, implementation=implementation)
        np.testing.assert_array_equal(y, x.astype(np.int64) @ codes.T.astype(np.int64))


@pytest.mark.parametrize("packing", ["ternary2", "ternary1.6"])
@pytest.mark.parametrize("rows", [1, 6])
def test_matrices_without_inputs_or_outputs(
    packing: Packing, rows: int, implementation: Implementation
) -> None:
    def product(n: int, k: int) -> jax.Array:
        x, packed = jnp.ones((rows, k), jnp.int8), jit_pack(jnp.ones((n, k), jnp.int8), packing)
        return jit_matmul(x, packed, packing=packing, implementation=implementation)

    np.testing.assert_array_equal(product(3, 0), np.zeros((rows, 3)))
    assert product(0, 7).shape == (rows, 0)
