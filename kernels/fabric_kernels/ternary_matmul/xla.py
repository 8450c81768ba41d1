"""The portable implementation: unpack inside the compiled program, then XLA's own dot.

XLA materialises the unpacked operand of a real dot on every platform, so what bounds the scratch is
how much is unpacked at once: one whole matrix as int8 (one byte a weight) for integer products, and
tiles of rows as float for float products, unless the rows they are multiplied with are larger.
"""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax

from fabric_kernels.absmax import absmax_quantize, scale_sums
from fabric_kernels.packing import CODES_PER_BYTE, unpack
from fabric_kernels.ternary_matmul.weight import TernaryWeight

# A float copy of a matrix above this, and above the rows that it is multiplied with, is made in
# tiles of about this size. It still lies in a cache, and the tiles are large enough for the dot to
# run at the speed of an untiled one.
FLOAT_SCRATCH_BYTES = 4 << 20
MIN_TILE_ROWS = 128


def linear(x: jax.Array, weights: Sequence[TernaryWeight]) -> tuple[jax.Array, ...]:
    """``scale · (q(x) · codes^T)`` for each weight, in the dtype of ``x``."""
    codes, act_scale = absmax_quantize(x)
    outputs: list[jax.Array] = []
    turn = codes
    for weight in weights:
        one = _in_turn(weight, turn)
        turn = scale_sums(matmul(codes, one), act_scale, one.scale).astype(x.dtype)
        outputs.append(turn)
    return tuple(outputs)


def _in_turn(weight: TernaryWeight, before: jax.Array) -> TernaryWeight:
    """The weight alone, not to be read until ``before`` has been computed.

    Unpacking depends on nothing but the weight: without this XLA unpacks all matrices of a layer at
    once, on GPU in one fusion, and holds them side by side.
    """
    one = weight.single()
    packed, _ = lax.optimization_barrier((one.packed, before))
    return replace(one, packed=packed)


def matmul(x: jax.Array, weight: TernaryWeight) -> jax.Array:
    """``x[..., k] · codes[n, k]^T``: int32 for int8 ``x``, else in the dtype of ``x``."""
    packed, k, packing = weight.single().packed, weight.k, weight.packing
    if jnp.issubdtype(x.dtype, jnp.integer):
        if 0 < x.size == k and packing == "ternary2":
            return _row_product(x, packed)
        return _integer_product(x, unpack(packed, k, packing))
    tile = _tile_rows(packed.shape[0], k, x)
    if tile is None:
        return _contract_last(x, unpack(packed, k, packing, x.dtype), x.dtype)
    tiles, tail = _row_tiles(packed, tile)

    def one(_: None, rows: jax.Array) -> tuple[None, jax.Array]:
        return None, _contract_last(x, unpack(rows, k, packing, x.dtype), x.dtype)

    y = jnp.moveaxis(lax.scan(one, None, tiles)[1], 0, -2)
    y = y.reshape(*x.shape[:-1], -1)
    if tail.shape[0] == 0:
        return y
    return jnp.concatenate([y, one(None, tail)[1]], axis=-1)


def linear_transposed(
    gradients: Sequence[jax.Array], weights: Sequence[TernaryWeight]
) -> jax.Array:
    """``sum_i scale_i · (g_i[..., n_i] · codes_i)`` in the dtype of the first."""
    total: jax.Array | None = None
    for g, weight in zip(gradients, weights, strict=True):
        one = _in_turn(weight, g if total is None else total)
        part = matmul_transposed((g.astype(jnp.float32) * one.scale).astype(g.dtype), one)
        total = part if total is None else total + part
    assert total is not None
    return total


def unscaled_transposed(
    gradients: Sequence[jax.Array], weights: Sequence[TernaryWeight]
) -> list[jax.Array]:
    """``g_i[..., n_i] · codes_i`` for each, one matrix unpacked after the other."""
    parts: list[jax.Array] = []
    for g, weight in zip(gradients, weights, strict=True):
        one = _in_turn(weight, parts[-1] if parts else g)
        parts.append(matmul_transposed(g, one))
    return parts


def matmul_transposed(g: jax.Array, weight: TernaryWeight) -> jax.Array:
    """``g[..., n] · codes`` in the dtype of ``g``."""
    packed, k, packing = weight.single().packed, weight.k, weight.packing
    n = packed.shape[0]
    tile = _tile_rows(n, k, g)
    if tile is None:
        return _contract_rows(g, unpack(packed, k, packing, g.dtype)).astype(g.dtype)
    tiles, tail = _row_tiles(packed, tile)
    full = n - tail.shape[0]
    columns = jnp.moveaxis(g[..., :full].reshape(*g.shape[:-1], -1, tile), -2, 0)

    def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        g_tile, rows = part
        return total + _contract_rows(g_tile, unpack(rows, k, packing, g.dtype)), None

    zero = jnp.zeros((*g.shape[:-1], k), jnp.float32)
    total, _ = lax.scan(add, zero, (columns, tiles))
    if tail.shape[0] > 0:
        total, _ = add(total, (g[..., full:], tail))
    return total.astype(g.dtype)


def _tile_rows(n: int, k: int, operand: jax.Array) -> int | None:
    """Rows unpacked at once, or None where the whole float matrix is small enough."""
    itemsize = operand.dtype.itemsize
    scratch = max(FLOAT_SCRATCH_BYTES, operand.size * itemsize)
    rows = max(MIN_TILE_ROWS, scratch // (k * itemsize))
    # Even tiles: one more of them rather than a short last one.
    tiles = -(-n // rows)
    return None if tiles == 1 else -(-n // tiles)


def _row_tiles(packed: jax.Array, tile: int) -> tuple[jax.Array, jax.Array]:
    full = packed.shape[0] // tile * tile
    return packed[:full].reshape(-1, tile, packed.shape[1]), packed[full:]


def _integer_product(x: jax.Array, codes: jax.Array) -> jax.Array:
    """Exact int32 sums of int8 products over the last axes.

    The axis is filled up with zeros to whole groups of four: for other lengths XLA's int8 dot on
    GPUs was seen to return twice the product (jax 0.11.2, H200, up to 16 rows).
    """
    pad = -x.shape[-1] % 4
    if pad:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)])
        codes = jnp.pad(codes, ((0, 0), (0, pad)))
    return _contract_last(x, codes, jnp.int32)


def _contract_last(x: jax.Array, w: jax.Array, accumulate: jnp.dtype) -> jax.Array:
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(
        x, w, contract, precision=_precision(x), preferred_element_type=accumulate
    )


def _contract_rows(g: jax.Array, w: jax.Array) -> jax.Array:
    contract = (((g.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(
        g, w, contract, precision=_precision(g), preferred_element_type=jnp.float32
    )


def _precision(x: jax.Array) -> lax.Precision | None:
    """Keeps accelerators from rounding float32 operands to TF32 or bfloat16."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _row_product(x: jax.Array, packed: jax.Array) -> jax.Array:
    """One row: the four fields of all bytes in turn, a multiply and reduce that XLA fuses on CPU.

    The sums are whole numbers of at most 2^24 as long as K <= 2^17 (a code may be -128), so float32
    holds them exactly.
    """
    k = x.shape[-1]
    dtype = jnp.float32 if k <= 1 << 17 else jnp.int32
    pad = packed.shape[1] * CODES_PER_BYTE - k
    by_field = jnp.pad(x.reshape(k), (0, pad)).reshape(-1, CODES_PER_BYTE).T.astype(dtype)
    products = jnp.zeros(packed.shape, dtype)
    for field in range(CODES_PER_BYTE):
        codes = ((packed >> (2 * field)) & 3).astype(dtype) - 1
        products = products + codes * by_field[field][None, :]
    return jnp.sum(products, axis=-1).astype(jnp.int32).reshape(*x.shape[:-1], -1)
