"""Products of codes with unpacked weights: exact, scaled once, rounded once."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels.absmax import scale_sums
from fabric_kernels.ternary_matmul import triton_codes
from fabric_kernels.triton_call import on_platform


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("m", "n", "k"), [(32, 64, 96), (37, 70, 200)])
def test_equals_scaled_integer_sums(m: int, n: int, k: int, dtype: str) -> None:
    random = np.random.default_rng(m)
    codes = random.integers(-128, 128, (m, k)).astype(np.int8)
    weights = random.integers(-1, 2, (n, k)).astype(np.int8)
    scale = jnp.asarray(random.random((m, 1)) + 0.5, jnp.float32)
    weight_scale = jnp.float32(0.37)
    sums = jnp.asarray(codes.astype(np.int64) @ weights.astype(np.int64).T, jnp.int32)
    expected = scale_sums(sums, scale, weight_scale).astype(dtype)
    tile = triton_codes.Tile(m=32, n=64, k=32, warps=4)
    call = partial(triton_codes.scaled, jnp.dtype(dtype), tile)
    factor = ((1.0 / scale) * weight_scale).reshape(-1)
    found = on_platform(call, jnp.asarray(codes), jnp.asarray(weights), factor)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected)
