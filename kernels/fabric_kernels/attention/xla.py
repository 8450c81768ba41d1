"""The implementation in plain jax, which XLA compiles for every device.

Short sequences hold all scores at once and leave the gradient to jax. Long ones go through tiles of
queries, forward and backward (Rabe & Staats 2021, "Self-attention does not need O(n²) memory",
arXiv:2112.05682). A tile sees all keys, so that its softmax is exact and nothing is rescaled; the
backward pass computes its weights anew instead of keeping them (Dao et al. 2022,
"FlashAttention", arXiv:2205.14135).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

TILE_BYTES = 16 * 2**20
SMALLEST_TILE = 16


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns channel i of ``x`` [B, T, heads, hd] against channel i + hd/2, in the dtype of ``x``.

    The angles are given as cosine and sine [B, T, hd/2].
    """
    cos, sin = (part.astype(x.dtype)[:, :, None, :] for part in angles)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    scale: float,
    *,
    tile_bytes: int = TILE_BYTES,
) -> jax.Array:
    """``softmax(scale · q·k^T)·v`` where ``mask`` is true; the softmax in float32.

    Where the scores exceed ``tile_bytes``, only first gradients, in reverse mode, are provided:
    ``jax.jvp`` raises, and second ones are not tested and would keep all scores.

    Args:
        q: [B, T, H, hd], floats.
        k: [B, S, K, hd], K a divisor of H.
        v: [B, S, K, hd].
        mask: bool [B, T, S]. A query that sees nothing gets the mean of all values.
        scale: factor on the scores.
        tile_bytes: what the float32 scores [B, H, tile, S] of a tile may take, unless even
            ``SMALLEST_TILE`` queries take more. An axis that ``vmap`` adds is not counted.

    Returns:
        [B, T, H, hd] in the dtype of v.
    """
    batch, queries, heads, width = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, queries, kv_heads, heads // kv_heads, width)
    row = 4 * batch * heads * k.shape[1]
    tile = _tile_size(row, tile_bytes)
    if queries <= tile or queries * row <= tile_bytes:
        return _attend(grouped, k, v, mask, scale).reshape(q.shape)
    return jnp.reshape(_tiled(scale, tile, grouped, k, v, mask), q.shape)


def _tile_size(row: int, tile_bytes: int) -> int:
    """How many queries of ``row`` bytes of scores make a tile, a power of two."""
    fitting = max(tile_bytes // max(row, 1), SMALLEST_TILE)
    return 1 << (fitting.bit_length() - 1)


def _precision(q: jax.Array) -> lax.Precision | None:
    return lax.Precision.HIGHEST if q.dtype == jnp.float32 else None


def _weights(q: jax.Array, k: jax.Array, mask: jax.Array, scale: float) -> jax.Array:
    """Float32 [B, K, H/K, T, S] of the queries [B, T, K, H/K, hd]; they sum to 1 over the keys."""
    scores = jnp.einsum(
        "btkgd,bskd->bkgts", q, k, precision=_precision(q), preferred_element_type=jnp.float32
    )
    scores = jnp.where(mask[:, None, None], scores * scale, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float) -> jax.Array:
    """[B, T, K, H/K, hd] in the dtype of v, holding all scores."""
    weights = _weights(q, k, mask, scale).astype(v.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v, precision=_precision(q))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tiled(
    scale: float, tile: int, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> jax.Array:
    """``_attend`` a tile of queries at a time; only its arguments are kept for the gradient."""

    def step(_: None, part: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        return None, _attend(part[0], k, v, part[1], scale)

    out = lax.scan(step, None, (_split(q, tile), _split(mask, tile)))[1]
    return _join(out, q.shape[1])


def _tiled_fwd(
    scale: float, tile: int, *inputs: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _tiled(scale, tile, *inputs), inputs


def _tiled_bwd(
    scale: float,
    tile: int,
    inputs: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    g: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, mask = inputs

    def step(
        sums: tuple[jax.Array, jax.Array], part: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        dq, dk, dv = _tile_gradients(part, k, v, scale)
        return (sums[0] + dk, sums[1] + dv), dq

    zeros = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    # Queries that were added see nothing and have no gradient: they add nothing to the sums.
    parts = (_split(q, tile), _split(mask, tile), _split(g, tile))
    (dk, dv), dq = lax.scan(step, zeros, parts)
    return _join(dq, q.shape[1]), dk.astype(k.dtype), dv.astype(v.dtype), None


_tiled.defvjp(_tiled_fwd, _tiled_bwd)


def _tile_gradients(
    part: tuple[jax.Array, jax.Array, jax.Array], k: jax.Array, v: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the queries, mask and gradient of one tile give.

    Returns:
        dq [B, tile, K, H/K, hd] in the dtype of q; dk and dv [B, S, K, hd] in float32.
    """
    q, mask, g = part
    product = partial(jnp.einsum, precision=_precision(q), preferred_element_type=jnp.float32)
    weights = _weights(q, k, mask, scale)
    dv = product("bkgts,btkgd->bskd", weights.astype(v.dtype), g)
    slopes = product("btkgd,bskd->bkgts", g, v)
    slopes = weights * (slopes - jnp.sum(weights * slopes, axis=-1, keepdims=True))
    # A query that sees nothing has weights all the same, but they do not depend on its scores.
    slopes = jnp.where(mask[:, None, None], slopes * scale, 0)
    # Float32 also for operands in half precision, as jax transposes the scores' product.
    dq = product("bkgts,bskd->btkgd", slopes, k.astype(jnp.float32))
    dk = product("bkgts,btkgd->bskd", slopes, q.astype(jnp.float32))
    return dq.astype(q.dtype), dk, dv


def _split(x: jax.Array, tile: int) -> jax.Array:
    """[B, T, ...] as [tiles, B, tile, ...], the last tile filled up with zeros."""
    batch, queries = x.shape[:2]
    tiles = -(-queries // tile)
    x = jnp.pad(x, [(0, 0), (0, tiles * tile - queries), *[(0, 0)] * (x.ndim - 2)])
    return jnp.moveaxis(x.reshape(batch, tiles, tile, *x.shape[2:]), 1, 0)


def _join(x: jax.Array, queries: int) -> jax.Array:
    """[tiles, B, tile, ...] as [B, queries, ...], what fills the last tile cut off."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :queries]
