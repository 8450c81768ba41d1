"""The portable GPU implementation: Pallas-Triton kernels for NVIDIA and, by lowering, AMD.

Activations are quantised once for a group of matrices and laid out in planes (``triton_kernels``):
by XLA, or for a few tokens by one kernel. Fields 0, 1, 2 of a byte enter the products as they are;
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
import numpy as np

from fabric_kernels.absmax import absmax_quantize
from fabric_kernels.packing import CODES_PER_BYTE, DIGITS_PER_BYTE
from fabric_kernels.ternary_matmul.prologue import Prologue, apply_prologue
from fabric_kernels.ternary_matmul.weight import TernaryWeight
from fabric_kernels.triton_call import on_platform, without_deprecation

if TYPE_CHECKING:
    from types import ModuleType

    from fabric_kernels.ternary_matmul.triton_kernels import Tile

FEW_TOKENS = 8
"""Up to these many rows a product is bound by reading the weights."""
QUANTIZED_BY_EACH = 2
"""Up to these many rows each program quantises them by itself, which spares a launch."""
MULTIPROCESSORS = 132
"""Programs that a large GPU runs at once; smaller ones only take more turns."""
FLOATS = ("bfloat16", "float16", "float32")


def kernels() -> "tuple[ModuleType, ModuleType]":
    """The kernels on matrix units and the one for few tokens.

    Raises:
        NotImplementedError: this JAX has no Pallas Triton.
    """
    try:
        with without_deprecation():
            from fabric_kernels.ternary_matmul import triton_few_tokens, triton_kernels
    except ImportError as error:
        raise NotImplementedError(
            f"jax {jax.__version__} has no Pallas Triton; use implementation xla or mosaic_gpu"
        ) from error
    return triton_kernels, triton_few_tokens


# ---- the functions of an implementation --------------------------------------------------------


def linear(x: jax.Array, weights: Sequence[TernaryWeight]) -> tuple[jax.Array, ...]:
    """``scale · (q(x) · codes^T)`` for each weight, in the dtype of ``x``.

    Up to ``FEW_TOKENS`` rows and in ``ternary2``, all weights in one launch.
    """
    _check_float(x)
    return _integer(x, tuple(weights), x.dtype)


def fuses_prologue(rows: int, weight: TernaryWeight) -> bool:
    """Whether :func:`linear_after` takes these."""
    return 0 < rows <= QUANTIZED_BY_EACH and weight.packing == "ternary2"


def linear_after(
    x: jax.Array, weights: Sequence[TernaryWeight], prologue: Prologue
) -> tuple[jax.Array, ...]:
    """``linear`` of ``norm(act(gate) · x)``, in one launch; where :func:`fuses_prologue`."""
    _check_float(x)
    gate = prologue.gate
    flat = replace(prologue, gate=None if gate is None else gate.reshape(-1, x.shape[-1]))
    outputs = _few_tokens(x.reshape(-1, x.shape[-1]), tuple(weights), x.dtype, flat)
    return tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in outputs)


def matmul(x: jax.Array, weight: TernaryWeight) -> jax.Array:
    """``x[..., k] · codes[n, k]^T``: int32 for int8 ``x``, else in the dtype of ``x``."""
    if x.dtype == jnp.int8:
        return _integer(x, (weight,), jnp.dtype(jnp.int32))[0]
    _check_float(x)
    rows = x.reshape(-1, x.shape[-1])
    m = rows.shape[0]
    if m == 0:
        return jnp.zeros((*x.shape[:-1], weight.n), x.dtype)
    tile = _product_tile(m, weight.n, _width(weight), x.dtype)
    planes = _planes(rows, weight, tile)
    call = partial(kernels()[0].product, m=m, tile=tile, packing=weight.packing, dtype=x.dtype)
    packed, _, layer = _stack(weight)
    return on_platform(call, planes, packed, layer).reshape(*x.shape[:-1], weight.n)


def linear_transposed(
    gradients: Sequence[jax.Array], weights: Sequence[TernaryWeight]
) -> jax.Array:
    """``sum_i scale_i · (g_i[..., n_i] · codes_i)`` in the dtype of the first.

    Summed in float32, rounded once.
    """
    total: jax.Array | None = None
    for i, (g, weight) in enumerate(zip(gradients, weights, strict=True)):
        last = i == len(weights) - 1
        dtype = gradients[0].dtype if last else jnp.dtype(jnp.float32)
        total = _transposed(g, weight, total, dtype, scaled=True)
    assert total is not None
    return total.reshape(*gradients[0].shape[:-1], weights[0].k)


def matmul_transposed(g: jax.Array, weight: TernaryWeight) -> jax.Array:
    """``g[..., n] · codes`` in the dtype of ``g``."""
    dx = _transposed(g, weight, None, g.dtype, scaled=False)
    return dx.reshape(*g.shape[:-1], weight.k)


# ---- calls of kernels --------------------------------------------------------------------------


def _integer(
    x: jax.Array, weights: tuple[TernaryWeight, ...], dtype: jnp.dtype
) -> tuple[jax.Array, ...]:
    """Products of int8 codes, exact; of floats, what ``linear`` returns."""
    rows = x.reshape(-1, x.shape[-1])
    m = rows.shape[0]
    if m == 0:
        return tuple(jnp.zeros((*x.shape[:-1], w.n), dtype) for w in weights)
    if m <= FEW_TOKENS and weights[0].packing == "ternary2":
        outputs = _few_tokens(rows, weights, dtype)
    else:
        outputs = _many_tokens(rows, weights, dtype)
    return tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in outputs)


def _quantized(rows: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Codes [M, K], their sums int32 [M], and what multiplies a token, float32 [M]."""
    factor = None
    if rows.dtype != jnp.int8:
        rows, scale = absmax_quantize(rows)
        factor = 1.0 / scale[:, 0]
    return rows, jnp.sum(rows, axis=-1, dtype=jnp.int32), factor


def _many_tokens(
    rows: jax.Array, weights: tuple[TernaryWeight, ...], dtype: jnp.dtype
) -> tuple[jax.Array, ...]:
    m = rows.shape[0]
    rows, sums, factor = _quantized(rows)
    tile = _product_tile(m, min(w.n for w in weights), _width(weights[0]), rows.dtype)
    planes = _planes(rows, weights[0], tile)
    pad = (0, planes.shape[1] - m)
    sums = jnp.pad(sums, pad)
    factor = None if factor is None else jnp.pad(factor, pad)
    return tuple(_product(planes, w, m, tile, sums, factor, dtype) for w in weights)


def _product(
    planes: jax.Array,
    weight: TernaryWeight,
    m: int,
    tile: "Tile",
    sums: jax.Array,
    factor: jax.Array | None,
    dtype: jnp.dtype,
) -> jax.Array:
    packed, scale, layer = _stack(weight)
    quantized = (sums,) if factor is None else (sums, factor, scale)

    def call(
        planes: jax.Array, packed: jax.Array, layer: jax.Array, quantized: Any, *, mode: Any
    ) -> jax.Array:
        return kernels()[0].product(
            planes,
            packed,
            layer,
            m,
            tile,
            packing=weight.packing,
            mode=mode,
            quantized=quantized,
            dtype=dtype,
        )

    return on_platform(call, planes, packed, layer, quantized)


def _few_tokens(
    rows: jax.Array,
    weights: tuple[TernaryWeight, ...],
    dtype: jnp.dtype,
    prologue: Prologue | None = None,
) -> tuple[jax.Array, ...]:
    tile = _row_tile(_width(weights[0]), min(w.n for w in weights))
    packed, scales, layers = zip(*(_stack(w) for w in weights), strict=True)
    before = prologue or Prologue()

    def call(
        rows: jax.Array, gate: Any, gain: Any, packed: Any, layers: Any, scales: Any, *, mode: Any
    ) -> Any:
        few = kernels()[1]
        row = few.Row(x=rows, gate=gate, activation=before.activation, gain=gain, eps=before.eps)
        if rows.dtype != jnp.int8 and (mode == "rocm" or rows.shape[0] > QUANTIZED_BY_EACH):
            after = replace(before, gate=gate, gain=gain)
            codes, scale = absmax_quantize(apply_prologue(rows, after, implementation="xla"))
            row = few.Row(x=codes, factors=1.0 / scale[:, 0])
        return few.few_tokens(row, packed, layers, scales, tile, mode=mode, dtype=dtype)

    return on_platform(call, rows, before.gate, before.gain, packed, layers, scales)


def _transposed(
    g: jax.Array, weight: TernaryWeight, before: jax.Array | None, dtype: jnp.dtype, scaled: bool
) -> jax.Array:
    """[M, K]."""
    _check_float(g)
    rows = g.reshape(-1, g.shape[-1])
    m, n = rows.shape
    if m == 0:
        return jnp.zeros((0, weight.k), dtype)
    tile = _transposed_tile(m, _width(weight), g.dtype)
    rows = jnp.pad(rows, ((0, -m % tile.m), (0, -n % tile.n)))
    packed, scale, layer = _stack(weight)

    def call(rows: Any, packed: Any, layer: Any, scale: Any, before: Any, *, mode: Any) -> Any:
        return kernels()[0].transposed(
            rows,
            packed,
            layer,
            (m, weight.k),
            tile,
            packing=weight.packing,
            mode=mode,
            scale=scale,
            before=before,
            dtype=dtype,
        )

    return on_platform(call, rows, packed, layer, scale if scaled else None, before)


def _check_float(x: jax.Array) -> None:
    if x.dtype.name not in FLOATS:
        raise TypeError(f"the Triton kernels take {', '.join(FLOATS)}, found {x.dtype}")


# ---- layouts and sizes -------------------------------------------------------------------------


def _stack(weight: TernaryWeight) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Bytes uint8 [L, N, W], scale float32 [L] or [1], layer int32 [1]."""
    # Triton's offsets are of 32 bits, signed, and JAX asks for 64 only from 2^32 bytes on.
    if weight.layer is not None and 1 << 31 <= weight.packed.size <= 1 << 32:
        weight = weight.single()
    if weight.layer is None:
        layer = np.zeros(1, np.int32)
        return weight.packed[None], weight.scale.reshape(1), jnp.asarray(layer)
    layer = jnp.asarray(weight.layer).astype(jnp.int32).reshape(1)
    return weight.packed, weight.scale.reshape(-1), layer


def _width(weight: TernaryWeight) -> int:
    return weight.packed.shape[-1]


def _planes(rows: jax.Array, weight: TernaryWeight, tile: "Tile") -> jax.Array:
    """Activations [M, K] as [P, M', W'], filled up with zeros to whole tiles."""
    m, k = rows.shape
    width = _width(weight)
    bottom = -m % tile.m
    right = -width % tile.w
    if weight.packing == "ternary2":
        rows = jnp.pad(rows, ((0, bottom), (0, CODES_PER_BYTE * (width + right) - k)))
        return rows.reshape(m + bottom, width + right, CODES_PER_BYTE).transpose(2, 0, 1)
    rows = jnp.pad(rows, ((0, bottom), (0, DIGITS_PER_BYTE * width - k)))
    planes = rows.reshape(m + bottom, DIGITS_PER_BYTE, width).transpose(1, 0, 2)
    return jnp.pad(planes, ((0, 0), (0, 0), (0, right)))


# Tiles and their pipelines keep to 96 KiB of shared memory, that of the smaller NVIDIA GPUs since
# Ampere; AMD's compiler buffers a stage less, which comes to half of that.


def _product_tile(m: int, n: int, width: int, dtype: jnp.dtype) -> "Tile":
    tile = kernels()[0].Tile
    if dtype == jnp.float32:
        return tile(m=min(32, _power(m, 16)), n=32, w=32, warps=4, stages=2)
    w = 64 // (dtype.itemsize)
    for tokens, outputs, warps in ((128, 128, 8), (128, 64, 4)):
        if m >= tokens and -(-m // tokens) * -(-n // outputs) >= MULTIPROCESSORS:
            return tile(m=tokens, n=outputs, w=w, warps=warps, stages=2)
    tokens = min(64, _power(m, 16))
    return tile(
        m=tokens, n=64, w=min(2 * w, _power(width, 32)), warps=4, stages=min(4, 64 // tokens + 1)
    )


def _row_tile(width: int, n: int) -> "Tile":
    """Whole rows of the matrix, about 128 bytes to a thread, unless that leaves some GPU idle."""
    w = _power(width, 32)
    warps = min(8, max(4, w // 512))
    rows = max(1, 128 * 32 * warps // w)
    while rows > 4 and -(-n // rows) < 2 * MULTIPROCESSORS:
        rows //= 2
    return kernels()[0].Tile(m=1, n=rows, w=w, warps=warps, stages=1)


def _transposed_tile(m: int, width: int, dtype: jnp.dtype) -> "Tile":
    tile = kernels()[0].Tile
    if dtype == jnp.float32:
        return tile(m=min(32, _power(m, 16)), n=32, w=32, warps=4, stages=2)
    if m >= 128 and -(-m // 128) * -(-width // 64) >= MULTIPROCESSORS:
        return tile(m=128, n=64, w=64, warps=8, stages=2)
    return tile(m=min(64, _power(m, 16)), n=64, w=32, warps=4, stages=3)


def _power(value: int, least: int) -> int:
    """The next power of two, at least ``least``."""
    return max(least, 1 << (value - 1).bit_length())
