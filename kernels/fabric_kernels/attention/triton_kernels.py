"""Pallas-Triton kernels of attention. ``triton.py`` calls them.

Forward and backward of Dao 2023, "FlashAttention-2" (arXiv:2307.08691): scores exist a tile at a
time, and the backward kernels compute them anew from the logarithm of the sum of exponentials that
the forward kernel leaves. Exponentials and logarithms are of base 2.

The mask comes as codes, one byte for a query and a key, and with the bounds of the tiles that it
leaves something in: empty ones are skipped, and those that it leaves whole do not read it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from fabric_kernels.triton_call import Mode
from fabric_kernels.triton_programs import program_id

Ref = Any
Factors = tuple[float, float]
"""What multiplies scores: for exponentials of base 2, and for gradients."""

HIDDEN, SEEN, BLIND = 0, 1, 2
"""Codes of the mask: the key is not seen, is seen, or the query sees no key at all."""
FAR = -(2.0**100)
"""Score of a hidden key. Finite: before a row's first key is seen, a difference must not be NaN.
And a power of two: its product with a factor is exact, so that such differences are 0."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Sizes of one program's work.

    Attributes:
        queries: at a time, a power of two from 16 on.
        keys: likewise.
        warps: of 32 threads (64 on AMD).
        stages: of the pipeline of loads.
    """

    queries: int
    keys: int
    warps: int
    stages: int

    def params(self) -> plgpu.CompilerParams:
        """For ``pallas_call``."""
        return plgpu.CompilerParams(num_warps=self.warps, num_stages=self.stages)


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    codes: jax.Array,
    bounds: jax.Array,
    factors: Factors,
    tile: Tile,
    *,
    mode: Mode,
) -> tuple[jax.Array, jax.Array]:
    """The output and, of each row of scores, the logarithm of the sum of exponentials.

    Args:
        q: [B, T, H, hd], floats. Head h reads key/value head h // (H / K).
        k: [B, S, K, hd] in the dtype of q.
        v: likewise.
        codes: int8 [B, T, S].
        bounds: int32 [B, tiles of queries, 4], of tiles of keys: those from the first to the second
            are not empty, among them those from the third to the fourth ``SEEN`` throughout.
        factors: on scores.
        tile: sizes.
        mode: what runs it.

    Returns:
        [B, T, H, hd] in the dtype of q; float32 [B, H, T], of base 2.
    """
    batch, queries, heads, _ = q.shape
    return pl.pallas_call(
        partial(_forward_tile, factor=factors[0], tile=tile, mode=mode),
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
        ),
        grid=(pl.cdiv(queries, tile.queries), heads, batch),
        compiler_params=tile.params(),
        interpret=mode == "interpret",
        name="attention",
    )(q, k, v, codes, bounds)


def _forward_tile(
    q: Ref,
    k: Ref,
    v: Ref,
    codes: Ref,
    bounds: Ref,
    out: Ref,
    logs: Ref,
    *,
    factor: float,
    tile: Tile,
    mode: Mode,
) -> None:
    """One program of ``forward``: a tile of queries of a head."""
    # Under a causal mask the last tiles take longest: they start first.
    index, head, row = pl.num_programs(0) - 1 - program_id(mode), pl.program_id(1), pl.program_id(2)
    shared = head // (q.shape[2] // k.shape[2])
    first = index * tile.queries
    own = _load_heads(q, row, first, tile.queries, head)

    def step(j: jax.Array, carry: Any, whole: bool) -> Any:
        total, largest, sums = carry
        at = j * tile.keys
        scores = _dot(own, _load_heads(k, row, at, tile.keys, shared, whole), 1, 1)
        if not whole:
            scores = _hide(scores, _load_codes(codes, row, first, at, tile), FAR)
        larger = jnp.maximum(largest, jnp.max(scores, axis=1))
        odds = _exponentials(scores, factor, (larger * factor)[:, None], mode)
        shrink = jnp.exp2((largest - larger) * factor)
        values = _load_heads(v, row, at, tile.keys, shared, whole)
        total = total * shrink[:, None] + _dot(odds.astype(v.dtype), values, 1, 0)
        return total, larger, sums * shrink + jnp.sum(odds, axis=1)

    start = (
        jnp.zeros(own.shape, jnp.float32),
        jnp.full(tile.queries, FAR, jnp.float32),
        jnp.zeros(tile.queries, jnp.float32),
    )
    total, largest, sums = _over_tiles(bounds, row, index, step, start)
    _store_heads(out, total / sums[:, None], row, first, head)
    _store_row(logs, largest * factor + jnp.log2(sums), row, head, first)


def query_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    codes: jax.Array,
    bounds: jax.Array,
    outputs: tuple[jax.Array, jax.Array, jax.Array],
    factors: Factors,
    tile: Tile,
    *,
    mode: Mode,
) -> tuple[jax.Array, jax.Array]:
    """The gradient by the queries, and what ``key_gradients`` needs of each row.

    Args:
        q: as ``forward``'s, and so are the other arrays.
        k: likewise.
        v: likewise.
        codes: likewise.
        bounds: likewise.
        outputs: of ``forward``, two, and the gradient by the first [B, T, H, hd].
        factors: on scores.
        tile: sizes.
        mode: what runs it.

    Returns:
        dq [B, T, H, hd] in the dtype of q; the sums over hd of output times gradient, float32
        [B, H, T].
    """
    batch, queries, heads, _ = q.shape
    out, logs, g = outputs
    return pl.pallas_call(
        partial(_query_tile, factors=factors, tile=tile, mode=mode),
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(logs.shape, jnp.float32),
        ),
        grid=(pl.cdiv(queries, tile.queries), heads, batch),
        compiler_params=tile.params(),
        interpret=mode == "interpret",
        name="attention_query_gradients",
    )(q, k, v, codes, bounds, out, logs, g)


def _query_tile(
    q: Ref,
    k: Ref,
    v: Ref,
    codes: Ref,
    bounds: Ref,
    out: Ref,
    logs: Ref,
    g: Ref,
    dq: Ref,
    deltas: Ref,
    *,
    factors: Factors,
    tile: Tile,
    mode: Mode,
) -> None:
    """One program of ``query_gradients``: a tile of queries of a head."""
    index, head, row = pl.num_programs(0) - 1 - program_id(mode), pl.program_id(1), pl.program_id(2)
    shared = head // (q.shape[2] // k.shape[2])
    first = index * tile.queries
    own, slope, result = (_load_heads(x, row, first, tile.queries, head) for x in (q, g, out))
    log = _load_row(logs, row, head, first, tile.queries, jnp.inf)
    delta = jnp.sum(slope.astype(jnp.float32) * result.astype(jnp.float32), axis=1)

    def step(j: jax.Array, total: jax.Array, whole: bool) -> jax.Array:
        at = j * tile.keys
        keys = _load_heads(k, row, at, tile.keys, shared, whole)
        values = _load_heads(v, row, at, tile.keys, shared, whole)
        scores = _dot(own, keys, 1, 1)
        slopes = _dot(slope, values, 1, 1) - delta[:, None]
        if not whole:
            # A query that sees nothing has weights all the same, but none depends on its scores.
            seen = _load_codes(codes, row, first, at, tile) == SEEN
            scores = jnp.where(seen, scores, -jnp.inf)
        slopes = _exponentials(scores, factors[0], log[:, None], mode) * slopes
        return total + _dot(slopes.astype(k.dtype), keys, 1, 0)

    total = _over_tiles(bounds, row, index, step, jnp.zeros(own.shape, jnp.float32))
    _store_heads(dq, total * factors[1], row, first, head)
    _store_row(deltas, delta, row, head, first)


def key_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    codes: jax.Array,
    bounds: jax.Array,
    rows: tuple[jax.Array, jax.Array, jax.Array],
    factors: Factors,
    tile: Tile,
    *,
    mode: Mode,
) -> tuple[jax.Array, jax.Array]:
    """The gradients by keys and values.

    Args:
        q: as ``forward``'s, and so are the other arrays.
        k: likewise.
        v: likewise.
        codes: likewise.
        bounds: int32 [B, tiles of keys, 4], of tiles of queries.
        rows: the logarithms of ``forward``, the sums of ``query_gradients``, and the gradient by
            the output [B, T, H, hd].
        factors: on scores.
        tile: sizes.
        mode: what runs it.

    Returns:
        dk and dv [B, S, K, hd] in the dtype of k.
    """
    batch, keys, kv_heads, _ = k.shape
    return pl.pallas_call(
        partial(_key_tile, factors=factors, tile=tile, mode=mode),
        out_shape=(jax.ShapeDtypeStruct(k.shape, k.dtype),) * 2,
        grid=(pl.cdiv(keys, tile.keys), kv_heads, batch),
        compiler_params=tile.params(),
        interpret=mode == "interpret",
        name="attention_key_gradients",
    )(q, k, v, codes, bounds, *rows)


def _key_tile(
    q: Ref,
    k: Ref,
    v: Ref,
    codes: Ref,
    bounds: Ref,
    logs: Ref,
    deltas: Ref,
    g: Ref,
    dk: Ref,
    dv: Ref,
    *,
    factors: Factors,
    tile: Tile,
    mode: Mode,
) -> None:
    """One program of ``key_gradients``: a tile of keys of a key/value head; scores transposed."""
    index, shared, row = program_id(mode), pl.program_id(1), pl.program_id(2)
    group = q.shape[2] // k.shape[2]
    at = index * tile.keys
    keys, values = (_load_heads(x, row, at, tile.keys, shared) for x in (k, v))

    def step(i: jax.Array, sums: Any, whole: bool, head: jax.Array) -> Any:
        first = i * tile.queries
        own = _load_heads(q, row, first, tile.queries, head)
        slope = _load_heads(g, row, first, tile.queries, head)
        log = _load_row(logs, row, head, first, tile.queries, jnp.inf)
        delta = _load_row(deltas, row, head, first, tile.queries, 0.0)
        scores = _dot(keys, own, 1, 1)
        slopes = _dot(values, slope, 1, 1) - delta[None, :]
        seen = None
        if not whole:
            seen = _load_codes(codes, row, first, at, tile).T
            scores = _hide(scores, seen, -jnp.inf)
        weights = _exponentials(scores, factors[0], log[None, :], mode)
        by_values = sums[1] + _dot(weights.astype(g.dtype), slope, 1, 0)
        slopes = weights * slopes
        if seen is not None:
            slopes = jnp.where(seen == SEEN, slopes, 0.0)
        return sums[0] + _dot(slopes.astype(q.dtype), own, 1, 0), by_values

    def head_step(i: Any, sums: Any) -> Any:
        return _over_tiles(bounds, row, index, partial(step, head=shared * group + i), sums)

    sums = (jnp.zeros(keys.shape, jnp.float32),) * 2
    sums = head_step(0, sums) if group == 1 else lax.fori_loop(0, group, head_step, sums)
    _store_heads(dk, sums[0] * factors[1], row, at, shared)
    _store_heads(dv, sums[1], row, at, shared)


# ---- parts of the kernels ----------------------------------------------------------------------


def _over_tiles(
    bounds: Ref, row: jax.Array, index: jax.Array, step: Callable[..., Any], carry: Any
) -> Any:
    """``step`` over the tiles within the bounds of tile ``index``: first the whole ones."""
    start, stop, whole_start, whole_stop = (bounds[row, index, i] for i in range(4))
    carry = lax.fori_loop(whole_start, whole_stop, partial(step, whole=True), carry)
    skipped = whole_stop - whole_start

    def partly(i: jax.Array, carry: Any) -> Any:
        return step(jnp.where(i >= whole_start, i + skipped, i), carry, whole=False)

    return lax.fori_loop(start, stop - skipped, partly, carry)


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """Float32; float32 operands are not rounded to TF32."""
    return lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _exponentials(scores: jax.Array, factor: float, less: jax.Array, mode: Mode) -> jax.Array:
    """``2 ** (scores · factor - less)``; XLA would never make one instruction of the two."""
    if mode != "cuda":
        return jnp.exp2(scores * factor - less)
    exponents = plgpu.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;",
        args=[
            scores,
            jnp.full(scores.shape, factor, jnp.float32),
            jnp.broadcast_to(-less, scores.shape),
        ],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(scores.shape, jnp.float32)],
    )
    return jnp.exp2(exponents[0])


def _hide(scores: jax.Array, codes: jax.Array, far: float) -> jax.Array:
    """A query that sees nothing has the same score for every key."""
    return jnp.where(codes == SEEN, scores, jnp.where(codes == BLIND, 0.0, far))


def _iota(shape: tuple[int, int], axis: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def _heads_at(
    ref: Ref, shape: tuple[int, int], row: jax.Array, first: jax.Array, head: jax.Array, whole: bool
) -> tuple[Ref, jax.Array | None]:
    """Where a tile of a head of [B, rows, heads, hd] lies, and which part of it does exist."""
    at = ref.at[row, pl.ds(first, shape[0]), head, pl.ds(0, shape[1])]
    mask = None if whole or ref.shape[1] % shape[0] == 0 else first + _iota(shape, 0) < ref.shape[1]
    if ref.shape[3] != shape[1]:
        columns = _iota(shape, 1) < ref.shape[3]
        mask = columns if mask is None else mask & columns
    return at, mask


def _load_heads(
    ref: Ref, row: jax.Array, first: jax.Array, count: int, head: jax.Array, whole: bool = False
) -> jax.Array:
    """[count, hd], hd up to a power of two; zeros where there is nothing. A whole tile exists."""
    width = max(pl.next_power_of_2(ref.shape[3]), 16)
    at, mask = _heads_at(ref, (count, width), row, first, head, whole)
    if mask is None:
        return plgpu.load(at)
    return plgpu.load(at, mask=mask, other=jnp.zeros((), ref.dtype))


def _store_heads(ref: Ref, value: jax.Array, row: jax.Array, first: jax.Array, head: jax.Array):
    shape = (value.shape[0], value.shape[1])
    at, mask = _heads_at(ref, shape, row, first, head, False)
    plgpu.store(at, value.astype(ref.dtype), mask=mask)


def _load_codes(ref: Ref, row: jax.Array, first: jax.Array, at: jax.Array, tile: Tile) -> jax.Array:
    """[tile.queries, tile.keys]; ``HIDDEN`` where there is nothing."""
    shape = (tile.queries, tile.keys)
    part = ref.at[row, pl.ds(first, shape[0]), pl.ds(at, shape[1])]
    if ref.shape[1] % shape[0] == 0 and ref.shape[2] % shape[1] == 0:
        return plgpu.load(part)
    mask = (first + _iota(shape, 0) < ref.shape[1]) & (at + _iota(shape, 1) < ref.shape[2])
    return plgpu.load(part, mask=mask, other=jnp.int8(HIDDEN))


def _load_row(
    ref: Ref, row: jax.Array, head: jax.Array, first: jax.Array, count: int, other: float
) -> jax.Array:
    at = ref.at[row, head, pl.ds(first, count)]
    if ref.shape[2] % count == 0:
        return plgpu.load(at)
    mask = first + lax.iota(jnp.int32, count) < ref.shape[2]
    return plgpu.load(at, mask=mask, other=jnp.float32(other))


def _store_row(ref: Ref, value: jax.Array, row: jax.Array, head: jax.Array, first: jax.Array):
    count = value.shape[0]
    mask = None
    if ref.shape[2] % count:
        mask = first + lax.iota(jnp.int32, count) < ref.shape[2]
    plgpu.store(ref.at[row, head, pl.ds(first, count)], value, mask=mask)
