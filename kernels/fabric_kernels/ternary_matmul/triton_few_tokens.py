"""A Pallas-Triton kernel for few tokens, where reading the weights is what takes time.

No matrix units: four bytes of weights and of each plane of activations are words for ``dp4a``. A
program first asks for its rows of weights, then makes the codes of a token while they arrive: it
gates, normalises and quantises the row by itself, as every other program does, which costs less
than a launch of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from fabric_kernels.absmax import EPSILON, rounded
from fabric_kernels.norm import Gate, activate
from fabric_kernels.packing import CODES_PER_BYTE
from fabric_kernels.ternary_matmul.triton_kernels import Ref, Tile, scale_at
from fabric_kernels.triton_call import Mode

# Four fields times four activations each, added up. Of the four sums of a group of four elements
# only the first is in use: the others are 0, which the compiler finds out.
_DOT = (
    "{ .reg .b32 f, s; and.b32 f, $4, 0x03030303; dp4a.s32.s32 s, f, $5, 0;"
    + "".join(
        f" shr.b32 f, $4, {2 * j}; and.b32 f, f, 0x03030303; dp4a.s32.s32 s, f, ${5 + j}, s;"
        for j in (1, 2, 3)
    )
    + " mov.b32 $0, s; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; }"
)

_EPSILON_BITS = int(np.float32(EPSILON).view(np.int32))


@dataclass(frozen=True, kw_only=True)
class Row:
    """How a token becomes codes.

    Attributes:
        x: int8 codes [M, K], or floats that are quantised.
        factors: what multiplies the product of a token, float32 [M], where ``x`` is codes of
            floats; None for the bare product.
        gate: floats [M, K], whose activation multiplies ``x`` first; or None.
        activation: of the gate.
        gain: floats [K], or [L, K] of which the matrices' layer is read, of an RMS norm before the
            quantiser; or None.
        eps: of the norm.
        residual: [M, N], what the product of the only matrix is added to; or None.
    """

    x: jax.Array
    factors: jax.Array | None = None
    gate: jax.Array | None = None
    activation: Gate | None = None
    gain: jax.Array | None = None
    eps: float = 0.0
    residual: jax.Array | None = None

    @property
    def operands(self) -> dict[str, jax.Array]:
        """The arrays that are there."""
        own = {
            "x": self.x,
            "factors": self.factors,
            "gate": self.gate,
            "gain": self.gain,
            "residual": self.residual,
        }
        return {name: array for name, array in own.items() if array is not None}


def few_tokens(
    row: Row,
    packed: Sequence[jax.Array],
    layers: Sequence[jax.Array],
    scales: Sequence[jax.Array],
    tile: Tile,
    *,
    mode: Mode,
    dtype: Any,
) -> tuple[jax.Array, ...]:
    """Products of some tokens and several ``ternary2`` matrices, in one launch.

    A program takes tile.n rows of a matrix, whole.

    Args:
        row: the tokens.
        packed: uint8 [L, N, W] each, with the same W.
        layers: int32 [1] each.
        scales: float32 [L] or [1] each; of no effect on bare products.
        tile: sizes.
        mode: what runs it; ``rocm``, where nothing rounds as exactly, takes codes only.
        dtype: of the results.

    Returns:
        [M, N] each.
    """
    m = row.x.shape[0]
    programs = [pl.cdiv(p.shape[1], tile.n) for p in packed]
    return tuple(
        pl.pallas_call(
            partial(_rows_of_group, row=row, programs=programs, tile=tile, mode=mode),
            out_shape=[jax.ShapeDtypeStruct((m, p.shape[1]), dtype) for p in packed],
            grid=(sum(programs),),
            compiler_params=tile.params(),
            interpret=mode == "interpret",
            name="ternary_few_tokens",
        )(*row.operands.values(), *layers, *packed, *scales)
    )


def _rows_of_group(*refs: Ref, row: Row, programs: list[int], tile: Tile, mode: Mode) -> None:
    """One program of ``few_tokens``: finds its matrix, which comes after those before it."""
    names, count = list(row.operands), len(programs)
    tokens = dict(zip(names, refs, strict=False))
    rest = refs[len(names) :]
    layers, packed, scales, outputs = (rest[i * count : (i + 1) * count] for i in range(4))
    program = pl.program_id(0)
    start = 0
    for g, length in enumerate(programs):
        run = partial(
            _rows,
            (tokens, row),
            (layers[g], packed[g], scales[g]),
            outputs[g],
            (program - start) * tile.n,
            tile=tile,
            mode=mode,
        )
        if count == 1:
            run()
        else:
            pl.when((program >= start) & (program < start + length))(run)
        start += length


def _rows(
    tokens: tuple[dict[str, Ref], Row],
    weight: tuple[Ref, Ref, Ref],
    out: Ref,
    first: jax.Array,
    *,
    tile: Tile,
    mode: Mode,
) -> None:
    """All tokens by tile.n rows of a matrix."""
    layer, packed, scale = weight
    index = layer[0]
    width = packed.shape[2]
    columns = lax.iota(jnp.int32, tile.w)
    # Rows past the end are the last one over again, and are not stored.
    numbers = first + lax.iota(jnp.int32, tile.n)
    rows = jnp.minimum(numbers, out.shape[1] - 1)
    bytes_ = plgpu.load(
        packed.at[index, _wide(rows, tile), _long(columns, tile)],
        mask=_long(columns < width, tile) if width != tile.w else None,
    )
    for t in range(out.shape[0]):
        refs, row = tokens
        before = (row.activation, row.eps)
        codes = codes_of_row(refs, before, (t, index), columns, mode)
        y = product_of_row(bytes_, codes, scale_at(scale, index), out.dtype, tile, mode)
        if "residual" in refs:
            y = y + plgpu.load(refs["residual"].at[t, rows])
        plgpu.store(out.at[t, numbers], y, mask=numbers < out.shape[1])


def _wide(rows: jax.Array, tile: Tile) -> jax.Array:
    return lax.broadcast_in_dim(rows, (tile.n, tile.w), (0,))


def _long(columns: jax.Array, tile: Tile) -> jax.Array:
    return lax.broadcast_in_dim(columns, (tile.n, tile.w), (1,))


@dataclass(frozen=True, kw_only=True)
class Codes:
    """A token as the products take it.

    Attributes:
        planes: four of int8 codes [W].
        total: their sum, int32.
        factor: gives what multiplies its products, in a shape; None for bare codes.
    """

    planes: list[jax.Array]
    total: jax.Array
    factor: Callable[[tuple[int, ...]], jax.Array] | None


def product_of_row(
    packed: jax.Array, codes: Codes, scale: jax.Array, dtype: Any, tile: Tile, mode: Mode
) -> jax.Array:
    """The products [tile.n] of a token and a tile of rows [tile.n, tile.w], in a dtype."""
    planes = [_long(plane, tile) for plane in codes.planes]
    y = jnp.sum(_dot(packed, planes, mode), axis=1) - codes.total
    if codes.factor is not None:
        y = rounded(y.astype(jnp.float32) * (codes.factor(y.shape) * scale))
    return y.astype(dtype)


def codes_of_row(
    refs: dict[str, Ref],
    before: tuple[Gate | None, float],
    at: tuple[Any, jax.Array],
    columns: jax.Array,
    mode: Mode,
) -> Codes:
    """A token quantised, after what comes before that.

    Args:
        refs: ``x`` [M, K], floats or codes; ``factors`` [M] of codes; ``gate`` [M, K] and ``gain``
            [K] or [L, K] where there are any.
        before: activation of the gate, epsilon of the norm.
        at: the token, and the layer of the gain.
        columns: of bytes, W of them.
        mode: what runs it.
    """
    k = refs["x"].shape[1]
    (t, layer), (activation, eps) = at, before

    def load(name: str, j: int) -> jax.Array:
        at, ref = CODES_PER_BYTE * columns + j, refs[name]
        if name == "gain":
            ref = ref.at[at] if len(ref.shape) == 1 else ref.at[layer, at]
        else:
            ref = ref.at[t, at]
        return plgpu.load(ref, mask=at < k, other=jnp.zeros((), ref.dtype))

    planes = [load("x", j) for j in range(CODES_PER_BYTE)]
    factor = None
    if refs["x"].dtype == jnp.int8:
        factor = partial(jnp.full, fill_value=refs["factors"][t]) if "factors" in refs else None
        codes = [plane.astype(jnp.int32) for plane in planes]
    else:
        if activation is not None:
            gates = [load("gate", j) for j in range(CODES_PER_BYTE)]
            planes = [gated(g, x, activation) for g, x in zip(gates, planes, strict=True)]
        if "gain" in refs:
            gains = [load("gain", j) for j in range(CODES_PER_BYTE)]
            planes = _normalise(planes, gains, k, eps)
        codes, factor = _quantize([plane.astype(jnp.float32) for plane in planes], mode)
    # One reduction across the program instead of four.
    total = jnp.sum(_added(codes))
    return Codes(planes=[plane.astype(jnp.int8) for plane in codes], total=total, factor=factor)


def _added(planes: list[jax.Array]) -> jax.Array:
    first, second, third, fourth = planes
    return (first + second) + (third + fourth)


def gated(gate: jax.Array, x: jax.Array, activation: Gate) -> jax.Array:
    """Steps rounded as ``gated_product``'s; Triton has no division in half precision."""
    if activation == "silu":
        return gate * jax.nn.sigmoid(gate.astype(jnp.float32)).astype(gate.dtype) * x
    return activate(gate, activation) * x


def _normalise(
    planes: list[jax.Array], gains: list[jax.Array], k: int, eps: float
) -> list[jax.Array]:
    """The RMS norm of a row; steps in the dtypes of ``rms_norm``."""
    dtype = planes[0].dtype
    wide = [x.astype(jnp.float32) for x in planes]
    inverse = lax.rsqrt(jnp.sum(_added([x * x for x in wide])) / k + eps)
    return [
        (x * inverse).astype(dtype) * gain.astype(dtype)
        for x, gain in zip(wide, gains, strict=True)
    ]


def _quantize(
    planes: list[jax.Array], mode: Mode
) -> tuple[list[jax.Array], Callable[[tuple[int, ...]], jax.Array]]:
    """``absmax_quantize`` of a row: int32 codes, and what multiplies its products, in a shape."""
    # Bits of magnitudes are ordered as these are, and what is not a number is above them all, where
    # a maximum of floats would leave it out.
    bits = [lax.bitcast_convert_type(jnp.abs(x), jnp.int32) for x in planes]
    most = jnp.max(jnp.maximum(jnp.maximum(*bits[:2]), jnp.maximum(*bits[2:])))
    largest = lax.bitcast_convert_type(jnp.maximum(most, _EPSILON_BITS), jnp.float32)

    def scale(shape: tuple[int, ...]) -> jax.Array:
        return _reciprocal(jnp.full(shape, largest), mode) * 127.0

    own = scale(planes[0].shape)
    codes = [jnp.clip(_round_product(x, own, mode), -128, 127) for x in planes]
    return codes, lambda shape: _reciprocal(scale(shape), mode)


def _dot(v: jax.Array, x: list[jax.Array], mode: Mode) -> jax.Array:
    """The products of four fields and their activations, added up within groups of elements."""
    if mode != "cuda":
        total = jnp.zeros(v.shape, jnp.int32)
        for j in range(CODES_PER_BYTE):
            field = ((v >> (2 * j)) & 3).astype(jnp.int32)
            total = total + field * x[j].astype(jnp.int32)
        return total
    (total,) = plgpu.elementwise_inline_asm(
        _DOT,
        args=[v, *x],
        constraints=",".join(["=&r"] * 4 + ["r"] * 5),
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(v.shape, jnp.int32)],
    )
    return total


def _reciprocal(x: jax.Array, mode: Mode) -> jax.Array:
    """1/x, correctly rounded: Triton's own division isn't."""
    if mode != "cuda":
        return 1.0 / x
    return plgpu.elementwise_inline_asm(
        "rcp.rn.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )[0]


def _round_product(x: jax.Array, scale: jax.Array, mode: Mode) -> jax.Array:
    """``rint(x · scale)`` as int32, each step rounded by itself; 0 for what is not a number."""
    if mode != "cuda":
        product = x * scale
        return jnp.where(jnp.isnan(product), 0.0, jnp.rint(product)).astype(jnp.int32)
    return plgpu.elementwise_inline_asm(
        "{ .reg .f32 t; mul.rn.f32 t, $1, $2; cvt.rni.s32.f32 $0, t; }",
        args=[x, scale],
        constraints="=r,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.int32)],
    )[0]
