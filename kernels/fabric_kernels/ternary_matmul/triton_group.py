"""Linears that share an input, with their adapters, in a few launches of Triton kernels.

Forward two launches: the input's codes with the adapters' narrow products, and all products with
the adapters' shares in their epilogue. Backward two with few tokens (``triton_gradients``), else
one more for each matrix.

What an adapter multiplies is rounded to the dtype of the activations, as in ``low_rank_product``;
sums are float32 and a result is rounded once.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fabric_kernels.absmax import absmax_quantize
from fabric_kernels.low_rank import LowRank, contract_with
from fabric_kernels.packing import CODES_PER_BYTE
from fabric_kernels.ternary_matmul.triton_layout import (
    group_kernels,
    kernels,
    narrow_tile,
    planes_of,
    power,
    product_tile,
    stack_of,
    sum_tile,
    transposed_parts,
    transposed_tile,
    width_of,
)
from fabric_kernels.ternary_matmul.weight import TernaryWeight
from fabric_kernels.triton_call import Mode, on_platform

MAX_RANK = 128
"""Adapters of more are products of their own, which are large enough for XLA's."""
MANY_TOKENS = 2048
"""From so many on in half precision, a group's narrow products are one of XLA's: on an H200 the
kernel that quantises 8192 tokens, and multiplied them too, took 50 to 86 us of 2048 channels."""

Weights = tuple[TernaryWeight, ...]
Adapters = tuple[LowRank | None, ...]
Narrow = list[jax.Array]
"""``scale · x · A^T``: of the adapters up to ``MAX_RANK`` side by side, [M, S], each followed by
zeros up to a rank that matrix units take; then of each of the others, [M, R]."""
Pair = tuple[jax.Array, jax.Array]


def linear_group(
    x: jax.Array, weights: Weights, adapters: Adapters
) -> tuple[list[jax.Array], Narrow]:
    """Outputs [M, N] for ``x`` [M, K], and what the backward pass reads; M is not 0."""

    def call(x: jax.Array, weights: Weights, small: Adapters, *, mode: Mode) -> Any:
        m, width = x.shape[0], width_of(weights[0])
        tile = product_tile(m, min(w.n for w in weights), width, jnp.dtype(jnp.int8))
        layout = group_kernels()[0].Layout(
            m + -m % tile.m, width + -width % tile.w, weights[0].packing, width
        )
        codes, sums, factors, narrow = _quantized(x, weights, small, layout, mode)
        packed, _, layers = zip(*(stack_of(w) for w in weights), strict=True)
        outputs = kernels()[0].products(
            codes,
            packed,
            layers,
            m,
            tile,
            packing=weights[0].packing,
            mode=mode,
            sums=sums,
            factors=factors,
            shares=_shares(narrow, small, "b"),
            dtype=x.dtype,
        )
        return list(outputs), narrow

    outputs, narrow = on_platform(call, x, weights, small_adapters(adapters))
    return _with_large(x, outputs, adapters, narrow)


def quantized_rows(
    x: jax.Array, weights: Weights, adapters: Adapters, rows: int, columns: int
) -> tuple[jax.Array, list[jax.Array], jax.Array]:
    """Codes int8 [rows, columns], zeros past K; a factor [rows] for each matrix; narrow products.

    Rows past those of ``x`` [M, K] may be anything. Narrow are those of adapters up to
    ``MAX_RANK``.
    """

    def call(x: jax.Array, weights: Weights, small: Adapters, *, mode: Mode) -> Any:
        layout = group_kernels()[0].Layout(rows, columns, None, width_of(weights[0]))
        codes, _, factors, narrow = _quantized(x, weights, small, layout, mode)
        return codes, factors, narrow

    return on_platform(call, x, weights, small_adapters(adapters))


def quantized_planes(
    x: jax.Array, weights: Weights, rows: int, columns: int
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """Those codes, each 64 of a row :func:`turned`; their sums int32 [rows]; and the factors."""

    def call(x: jax.Array, weights: Weights, *, mode: Mode) -> Any:
        layout = group_kernels()[0].Layout(rows, columns, None, width_of(weights[0]), turned=True)
        return _quantized(x, weights, (), layout, mode)[:3]

    return on_platform(call, x, weights)


def turned(codes: jax.Array) -> jax.Array:
    """[M, K], K whole sixty-fours: of each, the four planes of what goes with packed bytes.

    Code 4 q + j of it, which meets field j of byte q, comes to place 16 j + q.
    """
    return codes.reshape(len(codes), -1, 16, CODES_PER_BYTE).swapaxes(2, 3).reshape(codes.shape)


def _quantized(
    x: jax.Array, weights: Weights, small: Adapters, layout: Any, mode: Mode
) -> tuple[jax.Array, jax.Array, list[jax.Array], jax.Array]:
    if mode == "rocm":
        return _quantized_by_xla(x, weights, small, layout)
    own = [one for one in small if one is not None]
    scales = [stack_of(w)[1:] for w in weights]
    apart = x.dtype.itemsize == 2 and len(x) >= MANY_TOKENS
    tile = narrow_tile(x.shape[0], [one.a.shape[0] for one in own], x.dtype)
    run = partial(group_kernels()[0].quantize, x, scales=scales, layout=layout, tile=tile)
    *codes, narrow = run([] if apart else own, mode=mode)
    return *codes, narrow_of_all(x, own) if apart else narrow


def _quantized_by_xla(
    x: jax.Array, weights: Weights, small: Adapters, layout: Any
) -> tuple[jax.Array, jax.Array, list[jax.Array], jax.Array]:
    """The same where a kernel's division and rounding aren't exact."""
    codes, scale = absmax_quantize(x)
    bottom = (0, layout.rows - x.shape[0])
    sums = jnp.pad(jnp.sum(codes, axis=-1, dtype=jnp.int32), bottom)
    factor = 1.0 / scale[:, 0]
    places = [stack_of(weight)[1:] for weight in weights]
    scales = [scale[layer[0] if len(scale) > 1 else 0] for scale, layer in places]
    factors = [jnp.pad(factor * scale, bottom) for scale in scales]
    if layout.packing is None:
        codes = jnp.pad(codes, (bottom, (0, layout.columns - codes.shape[1])))
        codes = turned(codes) if layout.turned else codes
    else:
        codes = planes_of(codes, weights[0], layout.rows, layout.columns)
    narrow = [narrow_product(x, one) for one in small if one is not None]
    return codes, sums, factors, _padded(x, narrow)


def transposed_group(
    x: jax.Array | None,
    gradients: tuple[jax.Array, ...],
    weights: Weights,
    adapters: Adapters,
    narrow: Sequence[jax.Array],
    products: Sequence[jax.Array] | None = None,
    total: jax.Array | None = None,
) -> tuple[jax.Array, list[Pair | None]]:
    """The gradients by x [M, K], and by A and B of each adapter in float32; M is not 0.

    Args:
        x: [M, K], or None where there are no adapters.
        gradients: [M, N] each.
        weights: of each.
        adapters: of each, or None.
        narrow: what the forward call returned.
        products: ``g · codes`` [M, K] of each where they have been computed.
        total: their scaled sum [M, K] in place of them, likewise.
    """

    def call(*args: Any, mode: Mode) -> Any:
        return _transposed(*args, mode=mode)

    small, large = small_adapters(adapters), _large(adapters)
    own, others = list(narrow[:1]), list(narrow[1:])
    dx, pairs = on_platform(call, x, gradients, weights, small, own, products, total)
    for i, one in enumerate(large):
        if one is not None:
            assert x is not None
            back = _times(contract_with(gradients[i], one.b, 1), one.scale)
            dx = dx + contract_with(back, one.a, 0)
            pairs[i] = (_over_tokens(back, x), _over_tokens(others.pop(0), gradients[i]))
    return dx, pairs


def _transposed(
    x: Any,
    gradients: Sequence[jax.Array],
    weights: Weights,
    small: Adapters,
    narrow: Sequence[jax.Array],
    products: Sequence[jax.Array] | None,
    total: jax.Array | None,
    *,
    mode: Mode,
) -> tuple[jax.Array, list[Pair | None]]:
    dtype, module = gradients[0].dtype, group_kernels()[1]
    m, width, packing = gradients[0].shape[0], width_of(weights[0]), weights[0].packing
    present = [one for one in small if one is not None]
    parts: Any = None
    terms: list[Any] = []
    if total is not None:
        terms = [(total[None], None)]
    elif products is None:
        parts = transposed_parts(m, [w.n for w in weights], width, dtype)
    else:
        factors = [stack_of(w)[1:] for w in weights]
        terms = [(p[None], factor) for p, factor in zip(products, factors, strict=True)]
    back = None
    if parts or present:
        tile = narrow_tile(m, [one.b.shape[0] for one in present], dtype)
        matrices = [stack_of(w) for w in weights]
        some, back = module.over_outputs(
            gradients, matrices, small, weights[0].k, parts, tile, packing=packing, mode=mode
        )
        terms = terms if some is None else [(some, None)]
    shares = _shares(back, small, "a")
    dx = None if terms else _in_turn(gradients, weights, shares, mode)
    pairs: list[Any] = []
    if present:
        pairs = [(_columns(back, small), x)]
        wide = [g for g, one in zip(gradients, small, strict=True) if one is not None]
        pairs += [([u], g) for u, g in zip(_columns(narrow[0], small), wide, strict=True)]
    found: list[list[jax.Array]] = []
    if terms or pairs:
        sums = [(terms, [share for share in shares if share is not None])] if terms else []
        totals, found = module.add_up(sums, pairs, sum_tile(m, dtype), dtype=dtype, mode=mode)
        dx = totals[0] if terms else dx
    assert dx is not None
    order = iter(range(len(present)))
    places = [None if one is None else next(order) for one in small]
    return dx, [None if i is None else (found[0][i], found[1 + i][0]) for i in places]


def narrow_gradients(
    gradients: Sequence[jax.Array], weights: Weights, adapters: Adapters
) -> jax.Array:
    """``scale · g · B^T`` of all adapters, none above ``MAX_RANK``: [M, S], as narrow products."""

    def call(gradients: Any, weights: Weights, small: Adapters, *, mode: Mode) -> jax.Array:
        (m, _), dtype = gradients[0].shape, gradients[0].dtype
        tile = narrow_tile(m, [one.b.shape[0] for one in small if one is not None], dtype)
        matrices = [stack_of(w) for w in weights]
        options: Any = {"packing": weights[0].packing, "mode": mode}
        module = group_kernels()[1]
        return module.over_outputs(gradients, matrices, small, 0, None, tile, **options)[1]

    # Cast here, a layer's slice of a stack of adapters is no copy of its own.
    dtype = gradients[0].dtype
    own = tuple(None if one is None else replace(one, b=one.b.astype(dtype)) for one in adapters)
    return on_platform(call, tuple(gradients), weights, own)


def adapter_gradients(
    x: jax.Array,
    gradients: Sequence[jax.Array],
    adapters: Adapters,
    narrow: jax.Array,
    back: jax.Array,
) -> list[Pair | None]:
    """The gradients of A and B in float32 from both narrow products, x [M, K] and g [M, N] each."""

    def call(x: Any, gradients: Any, small: Adapters, narrow: Any, back: Any, *, mode: Mode) -> Any:
        pairs: list[Any] = [(_columns(back, small), x)]
        wide = [g for g, one in zip(gradients, small, strict=True) if one is not None]
        pairs += [([u], g) for u, g in zip(_columns(narrow, small), wide, strict=True)]
        tile, dtype = sum_tile(len(x), x.dtype), x.dtype
        of_a, *of_b = group_kernels()[1].add_up([], pairs, tile, dtype=dtype, mode=mode)[1]
        return of_a, [one[0] for one in of_b]

    found = on_platform(call, x, tuple(gradients), adapters, narrow, back)
    pairs = iter(list(zip(*found, strict=True)))
    return [None if one is None else next(pairs) for one in adapters]


def _in_turn(
    gradients: Sequence[jax.Array], weights: Weights, shares: Sequence[Any], mode: Mode
) -> jax.Array:
    """A launch for each matrix, which adds to what was before."""
    total: jax.Array | None = None
    for i, (g, weight, share) in enumerate(zip(gradients, weights, shares, strict=True)):
        packed, scale, layer = stack_of(weight)
        last = i == len(weights) - 1
        total = kernels()[0].transposed(
            g,
            packed,
            layer,
            weight.k,
            transposed_tile(g.shape[0], width_of(weight), g.dtype),
            packing=weight.packing,
            mode=mode,
            scale=scale,
            before=total,
            share=share,
            dtype=gradients[0].dtype if last else jnp.dtype(jnp.float32),
        )
    assert total is not None
    return total


# ---- adapters ----------------------------------------------------------------------------------


def _is_small(adapter: LowRank | None) -> bool:
    return adapter is not None and adapter.a.shape[0] <= MAX_RANK


def small_adapters(adapters: Adapters) -> Adapters:
    """Those that the kernels take."""
    return tuple(one if _is_small(one) else None for one in adapters)


def _large(adapters: Adapters) -> Adapters:
    return tuple(None if _is_small(one) else one for one in adapters)


def _columns(narrow: Any, small: Adapters) -> list[Any]:
    """The columns of each adapter that there is."""
    ranks = [one.a.shape[0] for one in small if one is not None]
    return group_kernels()[0].side_by_side(narrow, ranks)


def _shares(narrow: Any, small: Adapters, name: str) -> list[Any]:
    """Low-rank products with A or B, None where there is no adapter."""
    columns = iter(_columns(narrow, small))
    return [None if one is None else (next(columns), getattr(one, name)) for one in small]


def add_shares(
    x: jax.Array,
    outputs: Sequence[jax.Array],
    adapters: Adapters,
    narrow: jax.Array,
    *,
    added: bool = False,
) -> tuple[list[jax.Array], Narrow]:
    """Outputs [M, N] with the adapters' shares in the dtype of ``x``, and all narrow products.

    ``added`` says that the shares of adapters up to ``MAX_RANK`` are in the outputs already.
    """

    def call(outputs: Any, small: Any, narrow: Any, *, mode: Mode) -> Any:
        shares = _shares(narrow, small, "b")
        sums = [
            ([(y[None], None)], [share])
            for y, share in zip(outputs, shares, strict=True)
            if share is not None
        ]
        tile = sum_tile(len(x), x.dtype)
        added = iter(group_kernels()[1].add_up(sums, [], tile, dtype=x.dtype, mode=mode)[0])
        return [y if s is None else next(added) for y, s in zip(outputs, shares, strict=True)]

    small = small_adapters(adapters)
    if not added and any(one is not None for one in small):
        outputs = on_platform(call, list(outputs), small, narrow)
    return _with_large(x, [y.astype(x.dtype) for y in outputs], adapters, narrow)


def _with_large(
    x: jax.Array, outputs: Sequence[jax.Array], adapters: Adapters, narrow: jax.Array
) -> tuple[list[jax.Array], Narrow]:
    """The shares that the kernels don't make added."""
    result, all_narrow = list(outputs), [narrow]
    for i, one in enumerate(_large(adapters)):
        if one is not None:
            all_narrow.append(narrow_product(x, one))
            result[i] = result[i] + contract_with(all_narrow[-1], one.b, 0)
    return result, all_narrow


def add_by_xla(
    x: jax.Array, outputs: Sequence[jax.Array], adapters: Adapters
) -> tuple[list[jax.Array], Narrow]:
    """The same without kernels."""
    small = small_adapters(adapters)
    own = [narrow_product(x, one) for one in small if one is not None]
    narrow = _padded(x, own)
    result = [
        y if one is None else y + contract_with(own.pop(0), one.b, 0)
        for y, one in zip(outputs, small, strict=True)
    ]
    return _with_large(x, result, adapters, narrow)


def narrow_of_all(x: jax.Array, adapters: Sequence[LowRank]) -> jax.Array:
    """The narrow products of ``x`` side by side, in one product."""
    if not adapters:
        return jnp.zeros((len(x), 0), x.dtype)
    rows, scales = [], []
    for one in adapters:
        rank = power(one.a.shape[0], 16)
        rows.append(jnp.pad(one.a.astype(x.dtype), ((0, rank - one.a.shape[0]), (0, 0))))
        scales.append(jnp.full(rank, one.scale, jnp.float32))
    dims = (((1,), (1,)), ((), ()))
    product = lax.dot_general(x, jnp.concatenate(rows), dims, preferred_element_type=jnp.float32)
    return (product * jnp.concatenate(scales)[None, :]).astype(x.dtype)


def _padded(x: jax.Array, narrow: Sequence[jax.Array]) -> jax.Array:
    """The narrow products of ``x`` [..., K] side by side."""
    rows = [(0, 0)] * (x.ndim - 1)
    padded = [jnp.pad(u, [*rows, (0, power(u.shape[-1], 16) - u.shape[-1])]) for u in narrow]
    return jnp.concatenate(padded or [jnp.zeros((*x.shape[:-1], 0), x.dtype)], axis=-1)


def kept_narrow(x: jax.Array, narrow: Sequence[jax.Array | None]) -> tuple[jax.Array, ...]:
    """``Narrow`` of rows with any number of axes, from each adapter's product [..., R]."""
    own = [u for u in narrow if u is not None]
    small = _padded(x, [u for u in own if u.shape[-1] <= MAX_RANK])
    return small, *(u for u in own if u.shape[-1] > MAX_RANK)


def narrow_product(x: jax.Array, adapter: LowRank) -> jax.Array:
    """``scale · x · A^T``, by XLA."""
    return _times(contract_with(x, adapter.a, 1), adapter.scale)


def _times(x: jax.Array, scale: float) -> jax.Array:
    return x * jnp.asarray(scale, x.dtype)


def _over_tokens(narrow: jax.Array, wide: jax.Array) -> jax.Array:
    return lax.dot_general(
        narrow,
        wide,
        (((0,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST if wide.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
