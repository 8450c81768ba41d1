"""Attention in tiles of queries: against float64, against all scores at once, and what it holds."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import attention as public_attention
from fabric_kernels.attention import xla
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

Array = NDArray[np.float64]
Call = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
NAMES = ("out", "dq", "dk", "dv")
# The smallest tiles, and one that holds everything.
TILED, WHOLE = 1, 2**60


def operands(
    shape: tuple[int, int, int, int, int, int], seed: int = 0, dtype: str = "float32"
) -> list[jax.Array]:
    """Queries, keys, values and a gradient by the output for B, T, S, H, K, hd."""
    b, t, s, h, k, width = shape
    random = np.random.default_rng(seed)
    sizes = ((b, t, h, width), (b, s, k, width), (b, s, k, width), (b, t, h, width))
    return [jnp.asarray(random.standard_normal(size), dtype) for size in sizes]


def make_mask(b: int, t: int, s: int, seen: float, seed: int = 0) -> np.ndarray:
    """A share ``seen`` of the keys; the query in the middle sees nothing."""
    mask = np.random.default_rng(seed).random((b, t, s)) < seen
    mask[:, t // 2] = False
    return mask


def exact(inputs: list[jax.Array], mask: np.ndarray, scale: float) -> list[Array]:
    """The output and its gradients in float64, one query of one head at a time."""
    q, k, v, g = (np.asarray(x, np.float64) for x in inputs)
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    for b, t, h in np.ndindex(q.shape[:3]):
        shared = h // (q.shape[2] // k.shape[2])
        keys, values, seen = k[b, :, shared], v[b, :, shared], mask[b, t]
        scores = scale * keys @ q[b, t, h]
        odds = np.exp(scores - scores[seen].max(initial=-1e9)) * seen if seen.any() else seen + 1.0
        weights = odds / odds.sum()
        out[b, t, h] = weights @ values
        dv[b, :, shared] += np.outer(weights, g[b, t, h])
        jacobian = np.diag(weights) - np.outer(weights, weights)
        slopes = scale * (jacobian @ (values @ g[b, t, h])) * seen
        dq[b, t, h] = slopes @ keys
        dk[b, :, shared] += np.outer(slopes, q[b, t, h])
    return [out, dq, dk, dv]


def run(call: Call, inputs: list[jax.Array]) -> list[jax.Array]:
    """The output and the gradients, compiled."""

    @jax.jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> list[jax.Array]:
        out, transpose = jax.vjp(call, q, k, v)
        return [out, *transpose(g)]

    return both(*inputs)


def assert_close(found: object, expected: object, name: str, bound: float = 2e-6) -> None:
    wide = np.asarray(expected, np.float64)
    largest = max(float(np.abs(wide).max(initial=0)), 1.0)
    error = np.abs(np.asarray(found, np.float64) - wide).max(initial=0) / largest
    assert error <= bound, f"{name}: {error:.1e}"


def both_ways(mask: np.ndarray, scale: float) -> tuple[Call, Call]:
    """In tiles and all at once."""

    def make(tile_bytes: int) -> Call:
        return lambda q, k, v: xla.attention(
            q, k, v, jnp.asarray(mask), scale, tile_bytes=tile_bytes
        )

    return make(TILED), make(WHOLE)


@given(
    b=st.integers(1, 3),
    t=st.integers(17, 50),
    s=st.integers(1, 40),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    width=st.integers(1, 9),
    seen=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    scale=st.sampled_from([0.1, 0.5, 1.5]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=25, deadline=None)
@pytest.mark.slow
def test_equals_float64_and_untiled(
    b: int,
    t: int,
    s: int,
    kv_heads: int,
    group: int,
    width: int,
    seen: float,
    scale: float,
    seed: int,
) -> None:
    inputs = operands((b, t, s, kv_heads * group, kv_heads, width), seed)
    mask = make_mask(b, t, s, seen, seed)
    tiled, whole = (run(call, inputs) for call in both_ways(mask, scale))
    rows = zip(NAMES, tiled, whole, exact(inputs, mask, scale), strict=True)
    for name, found, other, expected in rows:
        assert found.dtype == other.dtype == jnp.float32
        assert_close(found, expected, name)
        assert_close(found, other, name)


@pytest.mark.parametrize("queries", [32, 33, 47])
def test_a_query_that_sees_nothing_gets_the_mean(queries: int) -> None:
    """And passes no gradient to its scores, in a whole tile and in one that is filled up."""
    inputs = operands((2, queries, 5, 4, 2, 3))
    mask = np.zeros((2, queries, 5), bool)
    out, dq, dk, dv = run(both_ways(mask, 0.7)[0], inputs)
    mean = np.repeat(np.mean(inputs[2], 1), 2, 1)[:, None]
    assert_close(out, np.broadcast_to(mean, out.shape), "out")
    assert not np.any(dq)
    assert not np.any(dk)
    assert_close(
        dv[:, 0], np.sum(np.asarray(inputs[3]).reshape(2, queries, 2, 2, 3), (1, 3)) / 5, "dv"
    )


def test_bfloat16() -> None:
    inputs = operands((2, 40, 24, 4, 2, 8), dtype="bfloat16")
    mask = make_mask(2, 40, 24, 0.6)
    tiled, whole = (run(call, inputs) for call in both_ways(mask, 0.35))
    rows = zip(NAMES, tiled, whole, exact(inputs, mask, 0.35), strict=True)
    for name, found, other, expected in rows:
        assert found.dtype == other.dtype == jnp.bfloat16
        assert_close(found, expected, name, 2**-7)
        # The untiled gradients round the products of half precision once more.
        assert_close(found, other, name, 2**-7)


def test_vmap_checkpoint_and_scan() -> None:
    """Layers that are rematerialised in a scan, over a mapped axis."""
    q, k, v, _ = operands((2, 35, 35, 4, 2, 8))
    calls = both_ways(make_mask(2, 35, 35, 0.5), 0.35)
    weights = jnp.asarray(np.random.default_rng(7).standard_normal((3, 8, 8)), jnp.float32) / 3

    def loss(weights: jax.Array, q: jax.Array, k: jax.Array, call: Call) -> jax.Array:
        @jax.checkpoint
        def layer(h: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
            return h + call(h @ weight, k, v), None

        return jnp.mean(jax.lax.scan(layer, q, weights)[0] ** 2)

    mapped = jnp.stack([q, 2 * q, -q])
    found, expected = (
        jax.jit(jax.vmap(jax.grad(partial(loss, call=call), (0, 1, 2)), (None, 0, None)))(
            weights, mapped, k
        )
        for call in calls
    )
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, "gradient")


def test_mask_may_be_mapped_and_nothing_need_be_compiled() -> None:
    q, k, v, _ = operands((1, 35, 20, 2, 1, 4))
    masks = jnp.stack([jnp.asarray(make_mask(1, 35, 20, 0.5, seed)) for seed in range(3)])

    def gradient(mask: jax.Array, tile_bytes: int) -> jax.Array:
        def loss(k: jax.Array) -> jax.Array:
            return jnp.sum(xla.attention(q, k, v, mask, 0.5, tile_bytes=tile_bytes) ** 2)

        return jax.grad(loss)(k)

    found = jax.vmap(partial(gradient, tile_bytes=TILED))(masks)
    assert_close(found, [gradient(mask, WHOLE) for mask in masks], "dk")


def uses_scan(shape: tuple[int, int, int, int, int, int], **options: int) -> bool:
    """Whether the call goes through tiles at all."""
    q, k, v, _ = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands(shape))
    mask = jax.ShapeDtypeStruct((shape[0], *shape[1:3]), jnp.bool_)
    call = partial(xla.attention, scale=0.5, **options)
    return "scan" in str(jax.make_jaxpr(call)(q, k, v, mask))


def test_what_fits_one_tile_is_left_to_jax() -> None:
    assert not uses_scan((1, 128, 128, 32, 8, 4))
    assert not uses_scan((1, 1, 4096, 32, 8, 1))
    assert not uses_scan((4, 16, 8, 2, 1, 4), tile_bytes=1)
    # All scores fit, though their number of queries is no power of two.
    assert not uses_scan((1, 100, 8, 2, 1, 4), tile_bytes=4 * 100 * 8 * 2)
    assert uses_scan((1, 100, 8, 2, 1, 4), tile_bytes=4 * 100 * 8 * 2 - 1)
    assert uses_scan((1, 1024, 1024, 16, 4, 1))


def test_tiles_are_powers_of_two_that_fit() -> None:
    for row in (4, 48, 4 * 4 * 16 * 512, 10**6, 10**9):
        tile = xla._tile_size(row, xla.TILE_BYTES)
        assert tile.bit_count() == 1
        assert tile == 16 or tile * row <= xla.TILE_BYTES < 2 * tile * row
        assert tile >= 16


def temporary_bytes(call: Call, inputs: list[jax.Array]) -> int:
    """What XLA sets aside for the value and the gradients besides what goes in and out."""

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(call(q, k, v) ** 2)

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*inputs[:3]).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("queries", "share"), [(512, 3), (2048, 20)])
def test_memory(queries: int, share: int) -> None:
    """No scores of all queries, forward or backward: a few tiles and copies of the operands."""
    b, t, heads, width = 4, queries, 16, 32
    inputs = operands((b, t, t, heads, heads, width))
    mask = np.broadcast_to(np.tri(t, dtype=bool), (b, t, t)).copy()
    tiled = temporary_bytes(
        partial(public_attention, mask=jnp.asarray(mask), implementation="xla"), inputs
    )
    whole = temporary_bytes(both_ways(mask, width**-0.5)[1], inputs)
    assert whole >= 2 * (4 * b * heads * t * t)
    assert tiled <= 4 * xla.TILE_BYTES + 2 * (sum(x.nbytes for x in inputs) + mask.nbytes)
    assert tiled <= whole / share
