"""W2A8 products on Hopper's int8 tensor cores, weights unpacked in registers (Pallas Mosaic GPU).

The roles are swapped, ``y^T[N, M] = codes[N, K] · x[M, K]^T``: wgmma takes its first operand from
registers, so packed bytes go from shared memory to registers and become int8 codes there, and
unpacked weights are never stored. The second operand, the tokens, comes from shared memory.

Two kernels: for codes in planes (``mosaic_gpu_planes``) and for codes in rows of k, any number of
tokens and what adapters add (``mosaic_gpu_rows``). Layouts of fragments: PTX ISA 9.7.15.5, wgmma
m64nNk32 of .s8. Weights as the register operand: the idea of the mixed-type kernels for this chip
(Machete; JAX's and tokamax's).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from fabric_kernels.absmax import scale_sums
from fabric_kernels.low_rank import LowRank
from fabric_kernels.packing import CODES_PER_BYTE
from fabric_kernels.ternary_matmul import (
    mosaic_gpu_planes,
    mosaic_gpu_planes_tiles,
    mosaic_gpu_rows,
    mosaic_gpu_rows_tiles,
    mosaic_gpu_share,
    mosaic_gpu_transposed,
    triton,
    xla,
)
from fabric_kernels.ternary_matmul.mosaic_gpu_rows_tiles import PIECE_BYTES
from fabric_kernels.ternary_matmul.mosaic_gpu_stack import round_up
from fabric_kernels.ternary_matmul.triton_group import (
    adapter_gradients,
    add_shares,
    narrow_gradients,
    quantized_planes,
    quantized_rows,
)
from fabric_kernels.ternary_matmul.triton_group import kept_narrow as kept_narrow
from fabric_kernels.ternary_matmul.weight import TernaryWeight

MOST_IN_PLANES = 1024
"""Up to so many tokens, and without adapters, codes go in planes: where that has been timed. On an
H200 a product then took about two thirds of the time of one of rows, at 128 and at 1024 tokens."""
LEAST_TOKENS = 128
"""From so many on the backward product is a kernel of this module too; Triton's divides the outputs
of a matrix among programs, so that few tokens occupy the GPU."""
UNPACKED_TOKENS = 1024
"""From so many float32 gradients on it is XLA's, of a matrix that it unpacks."""


def matmul(x: jax.Array, weight: TernaryWeight, *, interpret: Any = None) -> jax.Array:
    """``x[..., k] · codes[n, k]^T`` of int8 ``x``, exact in int32."""
    rows = x.reshape(-1, weight.k)
    _check_packing(weight)
    y = mosaic_gpu_rows.product(rows, weight, None, jnp.dtype(jnp.int32), interpret=interpret)
    return y.reshape(*x.shape[:-1], weight.n)


def scaled(
    codes: jax.Array,
    act_scale: jax.Array,
    weight: TernaryWeight,
    dtype: jnp.dtype,
    *,
    interpret: Any = None,
) -> jax.Array:
    """``scale · (codes[..., k] · weight^T) / act_scale[..., 1]`` in ``dtype``, rounded once."""
    if codes.size == 0 or dtype not in (jnp.bfloat16, jnp.float32):
        return scale_sums(matmul(codes, weight), act_scale, weight.single().scale).astype(dtype)
    rows = codes.reshape(-1, weight.k)
    factor = ((1.0 / act_scale) * weight.single().scale).reshape(-1)
    _check_packing(weight)
    y = mosaic_gpu_rows.product(rows, weight, factor, dtype, interpret=interpret)
    return y.reshape(*codes.shape[:-1], weight.n)


def linear(
    x: jax.Array, weights: Sequence[TernaryWeight], *, interpret: Any = None
) -> tuple[jax.Array, ...]:
    """``scale · (q(x) · codes^T)`` for each weight, in the dtype of ``x``.

    Exact int32 sums are multiplied once in float32, by ``scale / activation scale``.
    """
    return linear_with_adapters(x, weights, (None,) * len(weights), interpret=interpret)[0]


def linear_with_adapters(
    x: jax.Array,
    weights: Sequence[TernaryWeight],
    adapters: Sequence[LowRank | None],
    *,
    interpret: Any = None,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """:func:`linear` with the adapters' products added, and what the backward pass reads.

    The quantiser is a Triton kernel, a launch for all weights; so are the adapters, but those
    that the products' epilogues add (``mosaic_gpu_share``).
    """
    for weight in weights:
        _check_packing(weight)
    if x.size == 0:
        return triton.linear_with_adapters(x, weights, adapters)
    rows, leading, own = x.reshape(-1, x.shape[-1]), x.shape[:-1], tuple(adapters)
    dtype = x.dtype if x.dtype in (jnp.bfloat16, jnp.float32) else jnp.dtype(jnp.float32)
    if len(rows) <= MOST_IN_PLANES and all(adapter is None for adapter in own):
        outputs, kept = _of_planes(rows, tuple(weights), dtype, interpret)
    else:
        quantized = quantized_rows(rows, tuple(weights), own, *codes_shape(len(rows), weights))
        outputs, kept = of_quantized(rows, quantized, weights, own, dtype, interpret=interpret)
    return (
        tuple(y.reshape(*leading, y.shape[-1]) for y in outputs),
        tuple(u.reshape(*leading, u.shape[-1]) for u in kept),
    )


def codes_shape(m: int, weights: Sequence[TernaryWeight]) -> tuple[int, int]:
    """Of the codes of ``m`` tokens in rows, so that no product pads them."""
    choose = mosaic_gpu_rows_tiles.choose_tiles
    tokens = max(choose(m, weight.n).tokens for weight in weights)
    return round_up(m, tokens), _columns(weights[0])


def _columns(weight: TernaryWeight) -> int:
    """Codes of a row, so that no product pads it."""
    width = round_up(weight.packed.shape[-1], PIECE_BYTES)
    return CODES_PER_BYTE * max(PIECE_BYTES * 2, width)


def of_quantized(
    rows: jax.Array,
    quantized: tuple[jax.Array, list[jax.Array], jax.Array],
    weights: Sequence[TernaryWeight],
    adapters: tuple[LowRank | None, ...],
    dtype: jnp.dtype,
    *,
    interpret: Any = None,
) -> tuple[list[jax.Array], Sequence[jax.Array]]:
    """The products of ``quantized_rows`` of ``rows`` [M, K] with shares added, and narrow ones."""
    codes, factors, narrow = quantized
    shares = mosaic_gpu_share.shares_of(narrow, adapters, dtype)
    outputs = [
        mosaic_gpu_rows.product(
            codes, weight, factor, dtype, m=len(rows), share=share, interpret=interpret
        )
        for weight, factor, share in zip(weights, factors, shares, strict=True)
    ]
    added = any(share is not None for share in shares)
    return add_shares(rows, outputs, adapters, narrow, added=added)


def _of_planes(
    rows: jax.Array, weights: tuple[TernaryWeight, ...], dtype: jnp.dtype, interpret: Any
) -> tuple[list[jax.Array], Sequence[jax.Array]]:
    """Products of codes in planes, and the narrow products of no adapter."""
    m, choose = len(rows), mosaic_gpu_planes_tiles.choose_tiles
    tokens = max(choose(m, weight.n, weight.k).tokens for weight in weights)
    shape = round_up(m, tokens), _columns(weights[0])
    codes, sums, factors = quantized_planes(rows, weights, *shape)
    product = partial(mosaic_gpu_planes.product, codes, sums, m=m, interpret=interpret)
    outputs = [
        product(weight, factor, dtype).astype(rows.dtype)
        for weight, factor in zip(weights, factors, strict=True)
    ]
    return outputs, kept_narrow(rows, ())


def linear_transposed(
    gradients: Sequence[jax.Array], weights: Sequence[TernaryWeight], *, interpret: Any = None
) -> jax.Array:
    """``sum_i scale_i · (g_i[..., n_i] · codes_i)`` in the dtype of the first.

    Summed in float32 over all matrices and rounded once, but where gradients are float32.
    """
    if not _multiplies_back(gradients, weights):
        few = _rows(gradients[0]) < UNPACKED_TOKENS
        return (triton if few else xla).linear_transposed(gradients, weights)
    rows = [g.reshape(-1, g.shape[-1]) for g in gradients]
    dx = mosaic_gpu_transposed.product(rows, weights, interpret=interpret)
    return dx.reshape(*gradients[0].shape[:-1], weights[0].k)


def matmul_transposed(g: jax.Array, weight: TernaryWeight) -> jax.Array:
    """``g[..., n] · codes`` in the dtype of ``g``."""
    return linear_transposed((g,), (replace(weight, scale=jnp.ones((), jnp.float32)),))


def transposed_with_adapters(
    x: jax.Array,
    gradients: Sequence[jax.Array],
    weights: Sequence[TernaryWeight],
    adapters: Sequence[LowRank | None],
    narrow: Sequence[jax.Array],
    *,
    bits: int = 16,
    interpret: Any = None,
) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array] | None]]:
    """The gradients of :func:`linear_with_adapters`, as those of the Triton implementation.

    That makes the gradients of adapters, and adds their shares to the products with codes, where
    these don't do so themselves.
    """
    products = total = None
    if _adds_back(x, gradients, weights, adapters):
        rows = [g.reshape(-1, g.shape[-1]) for g in gradients]
        flat, of_x = x.reshape(-1, x.shape[-1]), narrow[0].reshape(-1, narrow[0].shape[-1])
        own, all_ = tuple(adapters), tuple(weights)
        back = narrow_gradients(rows, all_, own)
        share = mosaic_gpu_share.all_shares(back, own)
        dx = mosaic_gpu_transposed.product(rows, weights, share=share, interpret=interpret)
        return dx.reshape(x.shape), adapter_gradients(flat, rows, own, of_x, back)
    if _multiplies_back(gradients, weights):
        total = linear_transposed(gradients, weights, interpret=interpret)
        if all(adapter is None for adapter in adapters):
            return total, [None] * len(adapters)
    elif _rows(gradients[0]) >= UNPACKED_TOKENS:
        products = xla.unscaled_transposed(gradients, weights)
    return triton.transposed_with_adapters(
        x, gradients, weights, adapters, narrow, bits=bits, products=products, total=total
    )


def _adds_back(
    x: jax.Array,
    gradients: Sequence[jax.Array],
    weights: Sequence[TernaryWeight],
    adapters: Sequence[LowRank | None],
) -> bool:
    """Whether that kernel also adds the adapters' shares."""
    ranks = [one.b.shape[0] for one in adapters if one is not None]
    columns = sum(max(mosaic_gpu_share.RANK, 1 << (rank - 1).bit_length()) for rank in ranks)
    bfloat16 = all(g.dtype == jnp.bfloat16 for g in (x, *gradients))
    fit = 0 < columns <= mosaic_gpu_transposed.MOST_RANK
    return bfloat16 and fit and _multiplies_back(gradients, weights)


def _multiplies_back(gradients: Sequence[jax.Array], weights: Sequence[TernaryWeight]) -> bool:
    """Whether the backward product is a kernel of this module."""
    many = _rows(gradients[0]) >= LEAST_TOKENS
    return many and mosaic_gpu_transposed.takes(gradients, weights)


def _rows(g: jax.Array) -> int:
    return g.size // max(g.shape[-1], 1)


def _check_packing(weight: TernaryWeight) -> None:
    if weight.packing != "ternary2":
        raise ValueError(f"the Mosaic GPU kernel reads ternary2, found {weight.packing}")
