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
from fabric_kernels.triton_programs import program_id

# Each works on groups of four elements, in as many registers. A word of codes has those of a byte
# of weights; turned around, word j of a group has plane j of its four bytes, as dp4a wants them.
_TURN = (
    "{ .reg .b32 a, b, c, d; prmt.b32 a, $4, $5, 0x5140; prmt.b32 b, $6, $7, 0x5140;"
    " prmt.b32 c, $4, $5, 0x7362; prmt.b32 d, $6, $7, 0x7362;"
    " prmt.b32 $0, a, b, 0x5410; prmt.b32 $1, a, b, 0x7632;"
    " prmt.b32 $2, c, d, 0x5410; prmt.b32 $3, c, d, 0x7632; }"
)
# Of four sums of a group only the first is in use: the others are 0, which the compiler finds out.
_NONE = " mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; }"
# What the -1 of each code takes from the product of its field: all activations, added up.
_LESS = (
    "{ .reg .b32 s; dp4a.s32.s32 s, $4, 0x01010101, 0;"
    + "".join(f" dp4a.s32.s32 s, ${4 + j}, 0x01010101, s;" for j in (1, 2, 3))
    + " neg.s32 $0, s;"
    + _NONE
)
# Four fields times four activations each, added to that.
_DOT = (
    "{ .reg .b32 f, s; and.b32 f, $4, 0x03030303; dp4a.s32.s32 s, f, $5, $9;"
    + "".join(
        f" shr.b32 f, $4, {2 * j}; and.b32 f, f, 0x03030303; dp4a.s32.s32 s, f, ${5 + j}, s;"
        for j in (1, 2, 3)
    )
    + " mov.b32 $0, s;"
    + _NONE
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
    program = program_id(mode)
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
        words: int32 [W], the four int8 codes that go with a byte of weights, the first lowest.
        factor: gives what multiplies its products, in a shape; None for bare codes.
    """

    words: jax.Array
    factor: Callable[[tuple[int, ...]], jax.Array] | None


def product_of_row(
    packed: jax.Array, codes: Codes, scale: jax.Array, dtype: Any, tile: Tile, mode: Mode
) -> jax.Array:
    """The products [tile.n] of a token and a tile of rows [tile.n, tile.w], in a dtype."""
    y = jnp.sum(_dot(packed, _long(codes.words, tile), mode), axis=1)
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
    t = at[0]
    if refs["x"].dtype == jnp.int8:
        x = load_planes(refs["x"], t, columns)
        factor = partial(jnp.full, fill_value=refs["factors"][t]) if "factors" in refs else None
        return _as_codes([plane.astype(jnp.int32) for plane in x], factor)
    return _as_codes(*quantized_row(refs, before, at, columns, mode))


def quantized_row(
    refs: dict[str, Ref],
    before: tuple[Gate | None, float],
    at: tuple[Any, jax.Array],
    columns: jax.Array,
    mode: Mode,
) -> tuple[list[jax.Array], Callable[[tuple[int, ...]], jax.Array]]:
    """A token of floats: the planes of its codes, int32 [W], and its factor as in ``Codes``."""
    (t, layer), (activation, eps) = at, before
    x = load_planes(refs["x"], t, columns)
    if activation is not None:
        gates = load_planes(refs["gate"], t, columns)
        x = [gated(g, plane, activation) for g, plane in zip(gates, x, strict=True)]
    gain = refs.get("gain")
    if gain is not None:
        gains = load_planes(gain, None if len(gain.shape) == 1 else layer, columns)
        x = _normalise(x, gains, refs["x"].shape[1], eps)
    return _quantize([plane.astype(jnp.float32) for plane in x], mode)


def load_planes(
    ref: Ref, row: Any, columns: jax.Array, *, volatile: bool = False
) -> list[jax.Array]:
    """Four planes [W] of a row of an array [..., K], or of all of [K] without one."""
    planes: list[jax.Array] = []
    for j in range(CODES_PER_BYTE):
        at = CODES_PER_BYTE * columns + j
        where, other = ref.at[at] if row is None else ref.at[row, at], jnp.zeros((), ref.dtype)
        mask = at < ref.shape[-1]
        planes.append(plgpu.load(where, mask=mask, other=other, volatile=volatile))
    return planes


def codes_of_floats(
    x: list[jax.Array], gains: list[jax.Array] | None, k: int, eps: float, mode: Mode
) -> Codes:
    """A token in planes, normalised where there are gains, quantised."""
    if gains is not None:
        x = _normalise(x, gains, k, eps)
    codes, factor = _quantize([plane.astype(jnp.float32) for plane in x], mode)
    return _as_codes(codes, factor)


def _as_codes(
    codes: list[jax.Array], factor: Callable[[tuple[int, ...]], jax.Array] | None
) -> Codes:
    words = codes[0] & 0xFF
    for j in (1, 2, 3):
        words = words | ((codes[j] & 0xFF) << (8 * j))
    return Codes(words=words, factor=factor)


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


def _dot(v: jax.Array, words: jax.Array, mode: Mode) -> jax.Array:
    """Products of bytes of codes with words of activations, added up within groups of four."""
    if mode != "cuda":
        total = jnp.zeros(v.shape, jnp.int32)
        for j in range(CODES_PER_BYTE):
            code = ((v >> (2 * j)) & 3).astype(jnp.int32) - 1
            total = total + code * ((words << (24 - 8 * j)) >> 24)
        return total
    planes = _asm(_TURN, 4, words)
    return _asm(_DOT, 9, v, planes, _asm(_LESS, 4, planes))


def _asm(text: str, inputs: int, *args: jax.Array) -> jax.Array:
    """Int32 results, by groups of four elements in four registers."""
    return plgpu.elementwise_inline_asm(
        text,
        args=list(args),
        constraints=",".join(["=&r"] * 4 + ["r"] * inputs),
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, jnp.int32)],
    )[0]


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
