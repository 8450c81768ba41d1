"""Initialisers: distributions, formats, independence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import Packing, pack_ternary2, packed_width, repack, unpack_ternary2

from fabric_jax.layers import parameters
from fabric_jax.layers.parameters import (
    Constant,
    Normal,
    RandomTernary,
    Uniform,
    random_bits16,
)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_ternary_bytes_never_hold_field_3(seed: int) -> None:
    packed = np.asarray(RandomTernary(1332)(jax.random.key(seed), (64, 333), jnp.uint8))
    fields = (packed[..., None] >> np.array([0, 2, 4, 6])) & 3
    assert packed.dtype == np.uint8
    assert fields.max() == 2


@pytest.mark.parametrize("k", [5, 6, 7, 8])
def test_random_ternary_rows_end_as_packed_ones_do(k: int) -> None:
    packed = RandomTernary(k)(jax.random.key(0), (32, 2), jnp.uint8)
    np.testing.assert_array_equal(packed, pack_ternary2(unpack_ternary2(packed, k)))


def test_random_ternary_codes_are_equally_likely_and_independent() -> None:
    packed = RandomTernary(4096)(jax.random.key(0), (256, 1024), jnp.uint8)
    codes = np.asarray(unpack_ternary2(packed, 4096)).astype(np.int64)
    count = codes.size
    for code in (-1, 0, 1):
        assert np.mean(codes == code) == pytest.approx(1 / 3, abs=5 * np.sqrt(2 / 9 / count) + 1e-3)
    for lag in (1, 2, 3, 4):
        assert abs(np.mean(codes[:, lag:] * codes[:, :-lag])) < 5 / np.sqrt(count) + 1e-3
    byte_values = np.unique(np.asarray(packed))
    assert byte_values.size == 81


def draw(k: int, packing: Packing, shape: tuple[int, ...] = (37,)) -> jax.Array:
    make = RandomTernary(k, packing)
    return make(jax.random.key(7), (*shape, packed_width(k, packing)), jnp.uint8)


@pytest.mark.parametrize("k", [1, 4, 5, 23, 40])
@pytest.mark.parametrize("shape", [(37,), (2, 9), ()])
def test_a_key_gives_the_same_codes_in_both_layouts(k: int, shape: tuple[int, ...]) -> None:
    two, less = draw(k, "ternary2", shape), draw(k, "ternary1.6", shape)
    assert less.shape == (*shape, -(-k // 5))
    np.testing.assert_array_equal(repack(two, k, "ternary2", "ternary1.6"), less)


@pytest.mark.parametrize("block_bytes", [1, 60, 1000])
def test_blocks_do_not_change_what_is_drawn(
    block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 1, 10 and all of 37 rows; whole is what jax's own function draws."""
    draws = np.asarray(jax.random.bits(jax.random.key(7), (37, 6), jnp.uint16)) % 81
    digits = [draws // 27, draws // 9 % 3, draws // 3 % 3, draws % 3]
    expected = sum(digit << 2 * place for place, digit in enumerate(digits))
    monkeypatch.setattr(parameters, "DRAWN_BYTES", block_bytes)
    np.testing.assert_array_equal(draw(24, "ternary2"), expected)


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
def test_rows_of_random_bits_are_those_of_the_whole(implementation: str) -> None:
    key = jax.random.key(3, impl=implementation)
    whole = jax.random.bits(key, (31, 7), jnp.uint16)
    np.testing.assert_array_equal(random_bits16(key, (31, 7), jnp.int32(11), 13), whole[11:24])


def test_scratch_of_a_large_matrix_is_bounded() -> None:
    n, k = 13824, 5120
    make = RandomTernary(k, "ternary1.6")
    drawn = jax.jit(lambda key: make(key, (n, packed_width(k, make.packing)), jnp.uint8))
    compiled = drawn.lower(jax.random.key(0)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64 << 20


def test_normal_and_uniform_and_constant() -> None:
    key = jax.random.key(1)
    normal = np.asarray(Normal(0.02)(key, (200, 300), "float32"))
    assert normal.std() == pytest.approx(0.02, rel=0.02)
    assert abs(normal.mean()) < 5 * 0.02 / np.sqrt(normal.size)
    uniform = np.asarray(Uniform(0.25)(key, (200, 300), "float32"))
    assert -0.25 <= uniform.min() < -0.249
    assert 0.249 < uniform.max() <= 0.25
    assert uniform.std() == pytest.approx(0.25 / np.sqrt(3), rel=0.02)
    constant = Constant(3.0)(key, (2, 2), "bfloat16")
    assert constant.dtype == jnp.bfloat16
    assert np.all(np.asarray(constant, np.float32) == 3)
