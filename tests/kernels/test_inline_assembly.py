"""Kernels as they are compiled for CUDA, inline assembly and all, without a GPU."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels.norm.triton import How
from fabric_kernels.norm.triton_quantised import codes
from fabric_kernels.ternary_matmul import triton_few_tokens as few
from fabric_kernels.ternary_matmul.triton_kernels import Tile, codes_of_planes
from fabric_kernels.triton_exact import reciprocal, round_product, scalar_reciprocal
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from tests.kernels.inline_assembly import elementwise_inline_asm


@pytest.fixture
def assembled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inline assembly is carried out, launches are interpreted whatever they are for."""
    call = pl.pallas_call

    def interpreted(*args: Any, **options: Any) -> Any:
        return call(*args, **{**options, "interpret": True})

    monkeypatch.setattr(plgpu, "elementwise_inline_asm", elementwise_inline_asm)
    monkeypatch.setattr(pl, "pallas_call", interpreted)


def packed_rows(rng: np.random.Generator, n: int, k: int) -> jax.Array:
    fields = rng.integers(0, 3, (1, n, -(-k // 4), 4))
    fields.reshape(1, n, -1)[:, :, k:] = 1
    return jnp.asarray(np.sum(fields << np.arange(0, 8, 2), axis=-1), jnp.uint8)


@pytest.mark.parametrize(("k", "floats"), [(200, False), (1000, True)])
@pytest.mark.usefixtures("assembled")
def test_few_tokens(k: int, floats: bool) -> None:
    """The products are those of integers, and equal to those of the kernel for other GPUs."""
    rng = np.random.default_rng(k)
    packed = packed_rows(rng, 12, k)
    scale, layer = jnp.asarray([0.37], jnp.float32), jnp.zeros(1, jnp.int32)
    if floats:
        x = jnp.asarray(rng.standard_normal((2, k)), jnp.bfloat16)
        gain = jnp.asarray(rng.uniform(0.5, 2, k), jnp.bfloat16)
        row, dtype = few.Row(x=x, gain=gain, eps=1e-5), jnp.float32
    else:
        x = jnp.asarray(rng.integers(-128, 128, (2, k)), jnp.int8)
        row, dtype = few.Row(x=x), jnp.int32
    tile = Tile(m=1, n=4, w=max(128, 1 << (packed.shape[-1] - 1).bit_length()), warps=4, stages=1)
    run = partial(few.few_tokens, row, [packed], [layer], [scale], tile, dtype=dtype)
    (found,), (other,) = run(mode="cuda"), run(mode="interpret")
    np.testing.assert_array_equal(found, other)
    if not floats:
        fields = (np.asarray(packed)[0][..., None] >> np.arange(0, 8, 2)) & 3
        codes = fields.reshape(12, -1)[:, :k].astype(np.int64) - 1
        np.testing.assert_array_equal(found, np.asarray(x, np.int64) @ codes.T)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float16"])
@pytest.mark.usefixtures("assembled")
def test_planes_of_codes(dtype: str) -> None:
    packed = packed_rows(np.random.default_rng(0), 8, 128)[0]
    found = codes_of_planes(packed, jnp.dtype(dtype), "ternary2", "cuda")
    for j, plane in enumerate(found):
        field = ((np.asarray(packed) >> (2 * j)) & 3).astype(np.int32)
        expected = field if dtype == "int8" else field - 1
        np.testing.assert_array_equal(np.asarray(plane, np.float32), expected)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.usefixtures("assembled")
def test_normalised_codes(activation: Any) -> None:
    """Three pieces to a row; the quantiser's own steps are the assembly."""
    rng = np.random.default_rng(0)
    x, gate = (jnp.asarray(rng.standard_normal((8, 96)), jnp.bfloat16) for _ in range(2))
    gain = jnp.asarray(rng.uniform(0.5, 2, 96), jnp.float32)
    run = partial(codes, How(activation, 1e-5), x, gate if activation else None, gain)
    for found, other in zip(run(mode="cuda"), run(mode="interpret"), strict=True):
        np.testing.assert_array_equal(found, other)


@pytest.mark.usefixtures("assembled")
def test_exact_steps() -> None:
    """Reciprocals and rounded products are those of IEEE 754, which numpy computes."""
    rng = np.random.default_rng(1)
    x = rng.uniform(1e-5, 300, 512).astype(np.float32)
    inverse = np.float32(1) / x
    np.testing.assert_array_equal(reciprocal(jnp.asarray(x), "cuda"), inverse)
    np.testing.assert_array_equal(scalar_reciprocal(jnp.asarray(x[0]), "cuda"), inverse[0])
    values = (rng.integers(-400, 400, 512) / 2).astype(np.float32)  # halves are rounded to even
    values[:2] = np.nan, 0
    scale = np.where(np.arange(512) % 2, np.float32(1), x)
    expected = np.rint(np.nan_to_num(values) * scale).astype(np.int32)
    found = round_product(jnp.asarray(values), jnp.asarray(scale), "cuda")
    np.testing.assert_array_equal(found, expected)
