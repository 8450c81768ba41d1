"""The portable GPU implementation: Pallas-Triton kernels for NVIDIA and, by lowering, AMD.

Activations are quantised once for a group of matrices and laid out in planes (``triton_kernels``),
by one kernel. Fields 0, 1, 2 of a byte enter the products as they are;
the -1 of each code is one subtraction of the sum of a token's codes, exact in int32.

JAX has deprecated this backend in 0.11 and will remove it; its warning goes no further than
``triton_call``, and a JAX without it gets one clear error when a product is asked for.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from fabric_kernels.absmax import absmax_quantize
from fabric_kernels.low_rank import LowRank
from fabric_kernels.ternary_matmul.prologue import Prologue, apply_prologue
from fabric_kernels.ternary_matmul.triton_group import (
    add_by_xla,
    linear_group,
    transposed_group,
)
from fabric_kernels.ternary_matmul.triton_group import kept_narrow as kept_narrow
from fabric_kernels.ternary_matmul.triton_layout import (
    MULTIPROCESSORS,
    batch_kernels,
    batch_tile,
    check_float,
    kernels,
    planes_of,
    power,
    product_tile,
    stack_of,
    width_of,
)
from fabric_kernels.ternary_matmul.weight import TernaryWeight
from fabric_kernels.triton_call import on_platform

if TYPE_CHECKING:
    from fabric_kernels.ternary_matmul.triton_kernels import Tile

FEW_TOKENS = 2
"""Up to these many rows each program takes whole rows of weights and quantises the tokens itself.

From there on matrix units are faster (H200, N 13824, K 5120: 16 us for one token, 86 for eight; 24
for 64 on matrix units).
"""
BATCH_TOKENS = 64
"""Up to these many rows a prologue goes with the quantiser, and a residual with the product."""
GATED_BY_EACH = 4096
"""Channels up to which each program computes the gate too. On an H200, of 13824 channels, gate,
norm and product took 33 us, norm and product 16: more than a launch for the gate."""
LEAST_BYTES = 512
"""Of a row of weights in a program: 16 for each thread of a warp, whose words lie side by side."""


# ---- the functions of an implementation --------------------------------------------------------


def linear(x: jax.Array, weights: Sequence[TernaryWeight]) -> tuple[jax.Array, ...]:
    """``scale · (q(x) · codes^T)`` for each weight, in the dtype of ``x``.

    Up to ``FEW_TOKENS`` rows and in ``ternary2``, all weights in one launch.
    """
    return linear_with_adapters(x, weights, (None,) * len(weights))[0]


def linear_with_adapters(
    x: jax.Array, weights: Sequence[TernaryWeight], adapters: Sequence[LowRank | None]
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """:func:`linear` with the adapters' products added, and what the backward pass reads."""
    check_float(x)
    rows, leading = x.reshape(-1, x.shape[-1]), x.shape[:-1]
    own, all_ = tuple(adapters), tuple(weights)
    if rows.shape[0] == 0:
        none = [jnp.zeros((0, weight.n), x.dtype) for weight in weights]
        outputs, narrow = add_by_xla(rows, none, own)
    elif _are_few(rows, all_):
        outputs, narrow = add_by_xla(rows, _few_tokens(rows, all_, x.dtype), own)
    else:
        outputs, narrow = linear_group(rows, all_, own)
    return _with_axes(outputs, leading), _with_axes(narrow, leading)


def fuses_prologue(rows: int, weight: TernaryWeight) -> bool:
    """Whether :func:`linear_after` takes these."""
    return 0 < rows <= BATCH_TOKENS and weight.packing == "ternary2"


def linear_after(
    x: jax.Array,
    weights: Sequence[TernaryWeight],
    prologue: Prologue,
    residual: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """``residual + linear(norm(act(gate) · x))`` where :func:`fuses_prologue`.

    In one launch up to ``FEW_TOKENS`` rows, but for the gate where there are many channels; in two
    of more rows.
    """
    check_float(x)
    few = x.size // x.shape[-1] <= FEW_TOKENS
    if few and prologue.gate is not None and x.shape[-1] > GATED_BY_EACH:
        gated = replace(prologue, gain=None)
        x = apply_prologue(x, gated, implementation="xla")
        prologue = replace(prologue, gate=None, activation=None)
    gate = prologue.gate
    flat = replace(prologue, gate=None if gate is None else gate.reshape(-1, x.shape[-1]))
    rows = None if residual is None else residual.reshape(-1, residual.shape[-1])
    own = x.reshape(-1, x.shape[-1]), tuple(weights)
    outputs = _few_tokens(*own, x.dtype, flat, rows) if few else _batch(*own, flat, rows)
    return _with_axes(outputs, x.shape[:-1])


def matmul(x: jax.Array, weight: TernaryWeight) -> jax.Array:
    """``x[..., k] · codes[n, k]^T``: int32 for int8 ``x``, else in the dtype of ``x``."""
    if x.dtype == jnp.int8:
        return _integer(x, weight)
    check_float(x)
    rows = x.reshape(-1, x.shape[-1])
    m = rows.shape[0]
    if m == 0:
        return jnp.zeros((*x.shape[:-1], weight.n), x.dtype)
    tile = product_tile(m, weight.n, width_of(weight), x.dtype)
    planes = planes_of(rows, weight, tile.m, tile.w)
    packed, _, layer = stack_of(weight)
    call = partial(_products, m=m, tile=tile, packing=weight.packing, dtype=x.dtype)
    (y,) = on_platform(call, planes, (packed,), (layer,), None)
    return y.reshape(*x.shape[:-1], weight.n)


def linear_transposed(
    gradients: Sequence[jax.Array], weights: Sequence[TernaryWeight]
) -> jax.Array:
    """``sum_i scale_i · (g_i[..., n_i] · codes_i)`` in the dtype of the first.

    Summed in float32, rounded once.
    """
    none = (None,) * len(weights)
    return transposed_with_adapters(None, gradients, weights, none, ())[0]


def transposed_with_adapters(
    x: jax.Array | None,
    gradients: Sequence[jax.Array],
    weights: Sequence[TernaryWeight],
    adapters: Sequence[LowRank | None],
    narrow: Sequence[jax.Array],
    *,
    bits: int = 16,
    products: Sequence[jax.Array] | None = None,
    total: jax.Array | None = None,
) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array] | None]]:
    """The gradients of :func:`linear_with_adapters`: by ``x``, and by A and B (float32).

    ``x`` is not read where there are no adapters. ``products`` are the gradients' with codes,
    not scaled, where they have been computed, and ``total`` is their scaled sum. Fixed-point
    numbers, whose ``bits`` these are, aren't used here.
    """
    del bits
    for g in gradients:
        check_float(g)
    leading, k = gradients[0].shape[:-1], weights[0].k
    if gradients[0].size == 0:
        pairs = [
            None if a is None else (jnp.zeros(a.a.shape), jnp.zeros(a.b.shape)) for a in adapters
        ]
        return jnp.zeros((*leading, k), gradients[0].dtype), pairs
    some = any(adapter is not None for adapter in adapters)
    rows = [g.reshape(-1, g.shape[-1]) for g in gradients]
    dx, pairs = transposed_group(
        x.reshape(-1, k) if some and x is not None else None,
        tuple(rows),
        tuple(weights),
        tuple(adapters),
        [u.reshape(len(rows[0]), u.shape[-1]) for u in narrow],
        None if products is None else [p.reshape(-1, k) for p in products],
        None if total is None else total.reshape(-1, k),
    )
    return dx.reshape(*leading, k), pairs


def matmul_transposed(g: jax.Array, weight: TernaryWeight) -> jax.Array:
    """``g[..., n] · codes`` in the dtype of ``g``."""
    return linear_transposed((g,), (replace(weight, scale=jnp.ones((), jnp.float32)),))


# ---- calls of kernels --------------------------------------------------------------------------


def _integer(x: jax.Array, weight: TernaryWeight) -> jax.Array:
    """The exact product of int8 codes."""
    rows = x.reshape(-1, x.shape[-1])
    m, dtype = rows.shape[0], jnp.dtype(jnp.int32)
    if m == 0:
        return jnp.zeros((*x.shape[:-1], weight.n), dtype)
    few = _are_few(rows, (weight,))
    (y,) = _few_tokens(rows, (weight,), dtype) if few else (_many_tokens(rows, weight),)
    return y.reshape(*x.shape[:-1], weight.n)


def _are_few(rows: jax.Array, weights: Sequence[TernaryWeight]) -> bool:
    return rows.shape[0] <= FEW_TOKENS and weights[0].packing == "ternary2"


def _with_axes(rows: Sequence[jax.Array], leading: tuple[int, ...]) -> tuple[jax.Array, ...]:
    return tuple(one.reshape(*leading, one.shape[-1]) for one in rows)


def _many_tokens(codes: jax.Array, weight: TernaryWeight) -> jax.Array:
    m = codes.shape[0]
    tile = product_tile(m, weight.n, width_of(weight), codes.dtype)
    planes = planes_of(codes, weight, tile.m, tile.w)
    sums = jnp.pad(jnp.sum(codes, axis=-1, dtype=jnp.int32), (0, planes.shape[1] - m))
    packed, _, layer = stack_of(weight)
    call = partial(_products, m=m, tile=tile, packing=weight.packing, dtype=jnp.dtype(jnp.int32))
    return on_platform(call, planes, (packed,), (layer,), sums)[0]


def _products(
    planes: jax.Array, packed: Any, layers: Any, sums: Any, **options: Any
) -> tuple[jax.Array, ...]:
    return kernels()[0].products(planes, packed, layers, sums=sums, **options)


def _few_tokens(
    rows: jax.Array,
    weights: tuple[TernaryWeight, ...],
    dtype: jnp.dtype,
    prologue: Prologue | None = None,
    residual: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    tile = _row_tile(width_of(weights[0]), sum(w.n for w in weights))
    packed, scales, layers = zip(*(stack_of(w) for w in weights), strict=True)
    before = prologue or Prologue()

    def call(
        rows: jax.Array, before: Prologue, residual: Any, weights: tuple[Any, ...], *, mode: Any
    ) -> Any:
        few = kernels()[1]
        row = few.Row(
            x=rows,
            gate=before.gate,
            activation=before.activation,
            gain=before.gain,
            eps=before.eps,
            residual=residual,
        )
        if rows.dtype != jnp.int8 and mode == "rocm":
            alone = before.of_layer(weights[1][0][0])
            codes, scale = absmax_quantize(apply_prologue(rows, alone, implementation="xla"))
            row = few.Row(x=codes, factors=1.0 / scale[:, 0], residual=residual)
        return few.few_tokens(row, *weights, tile, mode=mode, dtype=dtype)

    return on_platform(call, rows, before, residual, (packed, layers, scales))


def _batch(
    rows: jax.Array,
    weights: tuple[TernaryWeight, ...],
    prologue: Prologue,
    residual: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """What comes before the quantiser and that in a launch, the products in the next."""
    m, width = rows.shape[0], width_of(weights[0])
    tile = batch_tile(m, [w.n for w in weights], width)
    shape = (tile.m, width + -width % tile.w)
    packed, scales, layers = zip(*(stack_of(w) for w in weights), strict=True)

    def call(
        rows: jax.Array, before: Prologue, residual: Any, weights: tuple[Any, ...], *, mode: Any
    ) -> Any:
        packed, layers, scales = weights
        kernel = batch_kernels()
        if mode == "rocm":
            alone = before.of_layer(layers[0][0])
            x = apply_prologue(rows, alone, implementation="xla")
            codes = kernel.codes_by_xla(x, shape)
        else:
            row = kernels()[1].Row(
                x=rows,
                gate=before.gate,
                activation=before.activation,
                gain=before.gain,
                eps=before.eps,
            )
            codes = kernel.batch_codes(row, layers[0], shape, mode=mode)
        return kernel.batch_products(
            codes, packed, layers, scales, residual, tile, m=m, mode=mode, dtype=rows.dtype
        )

    return on_platform(call, rows, prologue, residual, (packed, layers, scales))


def _row_tile(width: int, n: int) -> "Tile":
    """Whole rows of the matrix, 16 bytes of each at least and about 128 in all to a thread.

    ``n`` rows of a group take many more threads than the GPU has, or tiles are lower.
    """
    w = power(width, LEAST_BYTES)
    warps = 4 if w <= 2048 else 8
    rows = max(4, 128 * 32 * warps // w)
    while rows > 4 and -(-n // rows) < 2 * MULTIPROCESSORS:
        rows //= 2
    return kernels()[0].Tile(m=1, n=rows, w=w, warps=warps, stages=1)
