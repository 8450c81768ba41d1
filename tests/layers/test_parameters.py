"""Initialisers: distributions, formats, independence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import pack_ternary2, unpack_ternary2

from fabric_jax.layers.parameters import Constant, Normal, RandomTernary, Uniform


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
