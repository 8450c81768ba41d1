"""The Triton kernel of a step of decoding, interpreted, against plain jax; its lowering."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import cached_attention, empty_cache
from fabric_kernels.attention import KVCache, cached, triton_batch, triton_cached, xla

from tests.kernels.test_triton_kernel import lowered

L, B = 2, 3


def problem(
    heads: int, kv_heads: int, width: int, slots: int, dtype: str, positions: list[int]
) -> tuple[Any, ...]:
    rng = np.random.default_rng(heads + width)

    def floats(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    cache = empty_cache(L, B, slots, kv_heads, width, dtype)
    every = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32)[None], (B, slots))
    for layer in range(L):
        keys, values = (floats(B, slots, kv_heads, width) for _ in range(2))
        cache = cache.write(jnp.int32(layer), every, keys, values)
    angle = floats(B, 1, width // 2)
    at = jnp.asarray(positions, jnp.int32)[:, None]
    q, k, v = floats(B, 1, heads, width), *(floats(B, 1, kv_heads, width) for _ in range(2))
    return q, k, v, cache, at, (jnp.cos(angle), jnp.sin(angle))


CASES = [
    (4, 4, 16, 100, "float32", [0, 99, 64]),
    (6, 2, 24, 70, "float32", [63, 7, 70]),
    (4, 1, 32, 130, "bfloat16", [129, 1, 80]),
    (4, 2, 16, 90, "int8", [3, 89, 64]),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("stretch", [1024, 64])
def test_equals_plain_jax(case: Any, stretch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_cached, "STRETCH", stretch)
    q, k, v, cache, positions, angles = problem(*case)
    first = jnp.maximum(positions - 40, 0) if stretch == 64 else None

    def run(implementation: Any) -> tuple[jax.Array, KVCache]:
        step = partial(cached_attention, angles=angles, first=first, implementation=implementation)
        return jax.jit(step)(q, k, v, cache, jnp.int32(1), positions)

    (found, new), (expected, reference) = run("triton"), run("xla")
    np.testing.assert_allclose(found, expected, atol=2e-6, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(new), jax.tree.leaves(reference), strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        if case[4] == "int8":  # a code at a tie, an ulp of a scale
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1)
        else:
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)


HALF_CASES = [
    (4, 2, 64, 100, "bfloat16", [99, 50, 0]),
    (6, 2, 24, 70, "bfloat16", [63, 7, 70]),
    (8, 1, 32, 130, "bfloat16", [129, 1, 80]),
    (4, 4, 16, 90, "int8", [3, 89, 64]),
]


@pytest.mark.parametrize("case", HALF_CASES, ids=str)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("heads", [1, 1000], ids=["batch", "few-heads"])
def test_half_precision(
    case: Any, window: int | None, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both kernels, that of batches of many heads and the other."""
    monkeypatch.setattr(cached, "MANY_HEADS", heads)
    q, k, v, cache, positions, angles = problem(*case)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    assert triton_batch.takes(q, cache)
    first = None if window is None else jnp.maximum(positions - window, 0)
    arrays = (q, k, v, cache, jnp.int32(1), positions)
    (found, new), (expected, reference) = (
        cached_attention(*arrays, angles=angles, first=first, implementation=name)
        for name in ("triton", "xla")
    )
    assert found.dtype == jnp.bfloat16
    error = np.asarray(found, np.float32) - np.asarray(expected, np.float32)
    assert np.max(np.abs(error)) < 0.02
    for ours, theirs in zip(jax.tree.leaves(new), jax.tree.leaves(reference), strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        np.testing.assert_allclose(ours, theirs, rtol=1e-2, atol=float(case[4] == "int8"))


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"), [(32, 32, 64), (20, 5, 128), (40, 40, 128)]
)
def test_a_batch_of_many_heads_on_a_device(heads: int, kv_heads: int, width: int) -> None:
    """Sizes of bitnet-1b, bitnet-2b-4t and bitnet-13b; equal bits each time."""
    rows, slots = 32, 512
    rng = np.random.default_rng(heads)

    def floats(*dims: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(dims), jnp.bfloat16)

    q, k, v = (floats(rows, 1, n, width) for n in (heads, kv_heads, kv_heads))
    keys, values = (floats(1, rows, kv_heads, slots, width) for _ in range(2))
    cache = KVCache(keys=keys, values=values)
    positions = jnp.asarray(rng.integers(0, slots + 2, (rows, 1)), jnp.int32)
    angle = jnp.asarray(rng.standard_normal((rows, 1, width // 2)), jnp.float32)
    angles = (jnp.cos(angle), jnp.sin(angle))

    def run(implementation: Any) -> tuple[jax.Array, KVCache]:
        step = partial(cached_attention, angles=angles, implementation=implementation)
        return jax.jit(step)(q, k, v, cache, jnp.int32(0), positions)

    tries, (expected, reference) = [run("triton") for _ in range(20)], run("xla")
    for found, new in tries:
        np.testing.assert_array_equal(found, tries[0][0])
        np.testing.assert_array_equal(new.values, reference.values)
        # XLA may leave out the rounding between the steps of a turn.
        ours, theirs = (np.asarray(one.keys, np.float32) for one in (new, reference))
        np.testing.assert_allclose(ours, theirs, rtol=2**-6, atol=2**-6)
    error = np.asarray(tries[0][0], np.float32) - np.asarray(expected, np.float32)
    assert np.max(np.abs(error)) < 0.02


def test_weights_of_a_batch_are_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that nearly cancel out: rounded weights would leave ten times this error."""
    monkeypatch.setattr(cached, "MANY_HEADS", 1)
    q, k, v, cache, _, angles = problem(4, 2, 64, 100, "bfloat16", [0, 0, 0])
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    signs = jnp.where(jnp.arange(100) % 2 == 0, 1, -1).astype(jnp.bfloat16)
    values = jnp.broadcast_to(signs[:, None], cache.values.shape)
    cache = KVCache(keys=cache.keys, values=values)
    positions = jnp.full((B, 1), 100, jnp.int32)
    arrays = (q, k, v, cache, jnp.int32(1), positions)
    found = cached_attention(*arrays, angles=angles, implementation="triton")[0]
    turned = np.asarray(xla.rotate(q, angles), np.float64)[:, 0]
    scores = np.einsum("bhc,bhsc->bhs", turned, np.repeat(cache.keys[1], 2, axis=1).astype(float))
    weights = np.exp(scores / 8)
    expected = np.sum(weights * np.asarray(signs, np.float64), -1) / np.sum(weights, -1)
    error = np.asarray(found, np.float64)[:, 0] - expected[..., None]
    assert np.all(np.abs(error) < 2e-5 + 2**-8 * np.abs(expected)[..., None])


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("heads", [1, 1000], ids=["batch", "few-heads"])
def test_lowers_to_one_launch_in_place(
    platform: str, dtype: str, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached, "MANY_HEADS", heads)
    q, k, v, cache, positions, angles = problem(4, 2, 64, 128, dtype, [9, 8, 7])
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))

    def run(*arrays: Any) -> Any:
        q, k, v, cache, positions, angles = arrays
        return cached_attention(
            *(q, k, v, cache, jnp.int32(0), positions), angles=angles, implementation="triton"
        )

    text = lowered(run, q, k, v, cache, positions, angles, platform=platform)
    assert text.count("xla.gpu.triton") == 1
    assert text.count("output_operand_alias<") == len(jax.tree.leaves(cache))
