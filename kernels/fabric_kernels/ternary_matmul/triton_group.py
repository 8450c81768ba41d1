"""Linears that share an input, with their adapters, in a few launches of Triton kernels.

Forward two launches: the input's codes with the adapters' narrow products, and all products with
the adapters' shares in their epilogue. Backward two with few tokens (``triton_gradients``), else
one more for each matrix.

What an adapter multiplies is rounded to the dtype of the activations, as in ``low_rank_product``;
sums are float32 and a result is rounded once.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fabric_kernels.absmax import absmax_quantize
from fabric_kernels.low_rank import LowRank, contract_with
from fabric_kernels.ternary_matmul.triton_call import Mode, on_platform
from fabric_kernels.ternary_matmul.triton_layout import (
    group_kernels,
    kernels,
    narrow_tile,
    planes_of,
    product_tile,
    stack_of,
    sum_tile,
    transposed_parts,
    transposed_tile,
    width_of,
)
from fabric_kernels.ternary_matmul.weight import TernaryWeight

MAX_RANK = 128
"""Adapters of more are products of their own, which are large enough for XLA's."""

Weights = tuple[TernaryWeight, ...]
Adapters = tuple[LowRank | None, ...]
Narrow = list[jax.Array | None]
Pair = tuple[jax.Array, jax.Array]


def linear_group(
    x: jax.Array, weights: Weights, adapters: Adapters
) -> tuple[list[jax.Array], Narrow]:
    """Outputs [M, N] for ``x`` [M, K], and ``scale · x · A^T`` [M, R]; M is not 0."""

    def call(x: jax.Array, weights: Weights, adapters: Adapters, *, mode: Mode) -> Any:
        m, width = x.shape[0], width_of(weights[0])
        int8 = jnp.dtype(jnp.int8)
        tile = product_tile(m, min(w.n for w in weights), width, int8)
        layout = group_kernels()[0].Layout(
            m + -m % tile.m, width + -width % tile.w, weights[0].packing, width
        )
        codes, sums, factors, narrow = quantized(x, weights, adapters, layout, mode=mode)
        packed, _, layers = zip(*(stack_of(w) for w in weights), strict=True)
        shares = [
            None if one is None or u is None else (u, one.b)
            for one, u in zip(_small(adapters), narrow, strict=True)
        ]
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
            shares=shares,
            dtype=x.dtype,
        )
        return list(outputs), narrow

    outputs, narrow = on_platform(call, x, weights, adapters)
    return with_shares(outputs, _large(adapters), narrow), narrow


def quantized_rows(
    x: jax.Array, weights: Weights, adapters: Adapters, rows: int, columns: int
) -> tuple[jax.Array, list[jax.Array], Narrow]:
    """Codes int8 [rows, columns], zeros past K; a factor [rows] for each matrix; narrow products.

    Rows past those of ``x`` [M, K] may be anything.
    """

    def call(x: jax.Array, weights: Weights, adapters: Adapters, *, mode: Mode) -> Any:
        layout = group_kernels()[0].Layout(rows, columns, None, width_of(weights[0]))
        codes, _, factors, narrow = quantized(x, weights, adapters, layout, mode=mode)
        return codes, factors, narrow

    return on_platform(call, x, weights, adapters)


def quantized(
    x: jax.Array, weights: Weights, adapters: Adapters, layout: Any, *, mode: Mode
) -> tuple[jax.Array, jax.Array, list[jax.Array], Narrow]:
    """Codes, sums and factors as ``triton_quantize.quantize``, and all narrow products."""
    quantize = group_kernels()[0].quantize
    if mode == "rocm":
        return _quantized_by_xla(x, weights, adapters, layout)
    small = [one for one in _small(adapters) if one is not None]
    scales = [stack_of(w)[1:] for w in weights]
    tile = narrow_tile(x.shape[0], [one.a.shape[0] for one in small], x.dtype, shared=True)
    codes, sums, factors, own = quantize(x, small, scales, layout, tile, mode=mode)
    narrow = [
        own.pop(0) if is_small(one) else None if one is None else narrow_product(x, one)
        for one in adapters
    ]
    return codes, sums, factors, narrow


def _quantized_by_xla(
    x: jax.Array, weights: Weights, adapters: Adapters, layout: Any
) -> tuple[jax.Array, jax.Array, list[jax.Array], Narrow]:
    """The same where a kernel's division and rounding aren't exact."""
    codes, scale = absmax_quantize(x)
    bottom = (0, layout.rows - x.shape[0])
    sums = jnp.pad(jnp.sum(codes, axis=-1, dtype=jnp.int32), bottom)
    factor = 1.0 / scale[:, 0]
    factors = [jnp.pad(factor * weight.single().scale, bottom) for weight in weights]
    if layout.packing is None:
        codes = jnp.pad(codes, (bottom, (0, layout.columns - codes.shape[1])))
    else:
        codes = planes_of(codes, weights[0], layout.rows, layout.columns)
    narrow = [None if one is None else narrow_product(x, one) for one in adapters]
    return codes, sums, factors, narrow


def transposed_group(
    x: jax.Array | None,
    gradients: tuple[jax.Array, ...],
    weights: Weights,
    adapters: Adapters,
    narrow: Sequence[jax.Array | None],
    base: jax.Array | None = None,
) -> tuple[jax.Array, list[Pair | None]]:
    """The gradient by x [M, K], and by A and B of each adapter in float32; M is not 0.

    Args:
        x: [M, K], or None where there are no adapters.
        gradients: [M, N] each.
        weights: of each.
        adapters: of each, or None.
        narrow: what ``linear_group`` returned.
        base: ``sum scale · (g · codes)`` [M, K] where it has been computed.
    """
    own = [u for u, one in zip(narrow, adapters, strict=True) if is_small(one)]

    def call(x: Any, gradients: Any, weights: Any, small: Any, own: Any, base: Any, *, mode: Mode):
        return _transposed(x, gradients, weights, small, own, base, mode)

    dx, pairs = on_platform(call, x, gradients, weights, _small(adapters), own, base)
    for i, one in enumerate(adapters):
        if one is not None and not is_small(one):
            u = narrow[i]
            assert x is not None
            assert u is not None
            back = _times(contract_with(gradients[i], one.b, 1), one.scale)
            dx = dx + contract_with(back, one.a, 0)
            pairs[i] = (_over_tokens(back, x), _over_tokens(u, gradients[i]))
    return dx, pairs


def _transposed(
    x: Any,
    gradients: Sequence[jax.Array],
    weights: Weights,
    adapters: Adapters,
    narrow: Sequence[jax.Array],
    base: jax.Array | None,
    mode: Mode,
) -> tuple[jax.Array, list[Pair | None]]:
    first, module = gradients[0], group_kernels()[1]
    m, width, k = first.shape[0], width_of(weights[0]), weights[0].k
    present = [one for one in adapters if one is not None]
    parts = None
    if base is None:
        parts = transposed_parts(m, [w.n for w in weights], width, first.dtype)
    back: Narrow = [None] * len(weights)
    total = None if base is None else base[None]
    if parts or present:
        tile = narrow_tile(m, [one.b.shape[0] for one in present], first.dtype, shared=False)
        matrices = [stack_of(w) for w in weights]
        packing = weights[0].packing
        some, back = module.over_outputs(
            gradients, matrices, adapters, k, parts, tile, packing=packing, mode=mode
        )
        total = total if some is None else some
    shares = [(u, one.a) for u, one in zip(back, adapters, strict=True) if u is not None and one]
    dx = None
    if total is None:
        dx = _in_turn(gradients, weights, shares, mode)
    pairs = []
    if present:
        pairs = [([u for u in back if u is not None], x)]
        members = [g for g, one in zip(gradients, adapters, strict=True) if one is not None]
        pairs += [([u], g) for u, g in zip(narrow, members, strict=True)]
    if total is not None or pairs:
        sums = [] if total is None else [(total, shares)]
        tile = sum_tile(m, first.dtype)
        sums, products = module.add_up(sums, pairs, tile, dtype=first.dtype, mode=mode)
        dx = sums[0] if sums else dx
    assert dx is not None
    of_adapters: list[Pair | None] = []
    done = 0
    for one in adapters:
        of_adapters.append(None if one is None else (products[0][done], products[1 + done][0]))
        done += one is not None
    return dx, of_adapters


def _in_turn(
    gradients: Sequence[jax.Array], weights: Weights, shares: Sequence[Any], mode: Mode
) -> jax.Array:
    """A launch for each matrix, which adds to what was before; the first ones add a share too."""
    total: jax.Array | None = None
    for i, (g, weight) in enumerate(zip(gradients, weights, strict=True)):
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
            share=shares[i] if i < len(shares) else None,
            dtype=gradients[0].dtype if last else jnp.dtype(jnp.float32),
        )
    assert total is not None
    return total


# ---- adapters beside the kernels ---------------------------------------------------------------


def is_small(adapter: LowRank | None) -> bool:
    """Whether the kernels take it."""
    return adapter is not None and adapter.a.shape[0] <= MAX_RANK


def _small(adapters: Adapters) -> Adapters:
    return tuple(one if is_small(one) else None for one in adapters)


def with_shares(
    outputs: Sequence[jax.Array], adapters: Adapters, narrow: Sequence[jax.Array | None]
) -> list[jax.Array]:
    """Outputs with the adapters' shares, by XLA."""
    return [
        y if one is None or u is None else y + contract_with(u, one.b, 0)
        for y, one, u in zip(outputs, adapters, narrow, strict=True)
    ]


def _large(adapters: Adapters) -> Adapters:
    return tuple(None if is_small(one) else one for one in adapters)


def add_shares(
    outputs: Sequence[jax.Array],
    adapters: Adapters,
    narrow: Sequence[jax.Array | None],
    dtype: jnp.dtype,
) -> list[jax.Array]:
    """Outputs [M, N] of a product without adapters, with their shares, in one launch."""
    chosen = [i for i, one in enumerate(adapters) if is_small(one)]

    def call(outputs: Any, small: Any, own: Any, *, mode: Mode) -> Any:
        sums = [(y[None], [(u, one.b)]) for y, one, u in zip(outputs, small, own, strict=True)]
        tile = sum_tile(outputs[0].shape[0], dtype)
        return group_kernels()[1].add_up(sums, [], tile, dtype=dtype, mode=mode)[0]

    result = list(outputs)
    if chosen:
        picked = ([all_[i] for i in chosen] for all_ in (outputs, adapters, narrow))
        for i, y in zip(chosen, on_platform(call, *picked), strict=True):
            result[i] = y
    return with_shares([y.astype(dtype) for y in result], _large(adapters), narrow)


def narrow_product(x: jax.Array, adapter: LowRank) -> jax.Array:
    """``scale · x · A^T``, by XLA."""
    return _times(contract_with(x, adapter.a, 1), adapter.scale)


def _times(x: jax.Array, scale: float) -> jax.Array:
    return x * jnp.asarray(scale, x.dtype)


def _over_tokens(narrow: jax.Array, wide: jax.Array) -> jax.Array:
    return jax.lax.dot_general(
        narrow,
        wide,
        (((0,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if wide.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
