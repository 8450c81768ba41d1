"""A step of decoding against float64 attention over what the cache should hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import cached_attention, empty_cache
from fabric_kernels.attention.cache import quantize_vectors

# (B, H, K, S, hd, dtype of the cache): groups of heads, widths that fill no vector, single heads.
CASES = [
    (2, 4, 2, 19, 8, "float32"),
    (1, 6, 3, 40, 64, "bfloat16"),
    (3, 4, 4, 33, 24, "int8"),
    (2, 4, 2, 50, 18, "int8"),
]
LAYERS, LAYER = 3, 1


def random(*shape: int, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def turned(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    first, second = np.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def expected(q, keys, values, positions, firsts):
    """Float64; ``keys`` and ``values`` [B, S, K, hd] with the new token in its slot."""
    out = np.zeros(q.shape)
    group = q.shape[2] // keys.shape[2]
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        seen = slice(firsts[b], positions[b] + 1)
        scores = keys[b, seen, h // group] @ q[b, 0, h] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, 0, h] = weights / weights.sum() @ values[b, seen, h // group]
    return out


@pytest.mark.parametrize("case", CASES, ids=[f"{c[4]}-{c[5]}" for c in CASES])
def test_a_step_attends_to_what_the_row_has_seen(case, implementation) -> None:
    batch, heads, kv_heads, slots, width, dtype = case
    everywhere = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32)[None], (batch, slots))
    old = [random(batch, slots, kv_heads, width, seed=i) for i in (1, 2)]
    cache = empty_cache(LAYERS, batch, slots, kv_heads, width, dtype)
    cache = cache.write(jnp.int32(LAYER), everywhere, *old)
    q = random(batch, 1, heads, width, seed=3)
    k, v = (random(batch, 1, kv_heads, width, seed=i) for i in (4, 5))
    positions = np.random.default_rng(6).integers(0, slots, batch)
    positions[0] = slots - 1
    firsts = np.maximum(positions - 6, 0)
    angles = random(batch, 1, width // 2, seed=7)
    angles = (jnp.cos(angles), jnp.sin(angles))

    @jax.jit
    def step(q, k, v, cache):
        at, first = (jnp.asarray(x[:, None], jnp.int32) for x in (positions, firsts))
        return cached_attention(
            *(q, k, v, cache, jnp.int32(LAYER), at),
            angles=angles,
            first=first,
            implementation=implementation,
        )

    found, new = step(q, k, v, cache)
    # What the cache holds is read back, so that only the attention is compared.
    keys, values = (np.asarray(x, np.float64) for x in new.read(jnp.int32(LAYER), jnp.float32))
    cos, sin = (np.asarray(x, np.float64) for x in angles)
    wide = [np.asarray(x, np.float64) for x in (q, k, v)]
    result = expected(turned(wide[0], cos, sin), keys, values, positions, firsts)
    np.testing.assert_allclose(found, result, rtol=0, atol=2e-5)
    error = {"float32": 1e-6, "bfloat16": 2**-8, "int8": 1 / 127}[dtype]
    for b, at in enumerate(positions):
        for stored, own in ((keys, turned(wide[1], cos, sin)), (values, wide[2])):
            largest = np.abs(own[b, 0]).max()
            np.testing.assert_allclose(stored[b, at], own[b, 0], rtol=0, atol=error * largest)
    others = np.ones((batch, slots), bool)
    others[np.arange(batch), positions] = False
    before = cache.read(jnp.int32(LAYER), jnp.float32)
    for now, then in zip((keys, values), before, strict=True):
        np.testing.assert_array_equal(now[others], np.asarray(then, np.float64)[others])
    assert not np.any(np.asarray(new.keys[0]))


def test_codes_of_a_vector_are_off_by_half_a_scale_at_most() -> None:
    x = random(5, 7, 24, seed=0).at[0, 0].set(0)
    codes, scale = quantize_vectors(x)
    assert codes.dtype == jnp.int8
    np.testing.assert_allclose(scale * 127, jnp.abs(x).max(-1), rtol=1e-6)
    error = np.abs(np.asarray(codes, np.float64) * np.asarray(scale)[..., None] - np.asarray(x))
    assert np.all(error <= 0.5001 * np.asarray(scale)[..., None])


def test_wrong_shapes_are_refused() -> None:
    cache = empty_cache(1, 2, 4, 2, 8, "float32")
    k = jnp.zeros((2, 1, 2, 8))
    angles = (jnp.zeros((2, 1, 4)), jnp.zeros((2, 1, 4)))
    for wrong in (jnp.zeros((2, 2, 4, 8)), jnp.zeros((2, 1, 3, 8)), jnp.zeros((1, 1, 4, 8))):
        with pytest.raises(ValueError, match="one token a row"):
            cached_attention(
                *(wrong, k, k, cache, jnp.int32(0), jnp.zeros((2, 1), jnp.int32)), angles=angles
            )
