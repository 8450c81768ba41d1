"""Tensors of a file as floats, and ternary matrices that were stored in a format of floats."""

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray

from fabric_jax.checkpoints.arrays import HostArray, is_finite
from fabric_jax.checkpoints.gguf.codecs import (
    decode_i2s,
    decode_tq1,
    decode_tq2,
    one_scale,
    rows_a_chunk,
)
from fabric_jax.checkpoints.source import ALL_ROWS, TernaryMatrix
from fabric_jax.checkpoints.ternary import pack_codes
from fabric_jax.errors import FabricError
from fabric_jax.gguf_container import GgufFile

TERNARY = ("TQ1_0", "TQ2_0", "I2_S")
STORED = {"F32": "<f4", "F16": "<f2"}
QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def read_floats(file: GgufFile, name: str, rows: slice = ALL_ROWS) -> HostArray:
    """A tensor: float32, float16 or bfloat16 as it is stored, float32 where it was quantised.

    Raises:
        FabricError: it has a type that can't be read as floats, or values that are not finite.
    """
    tensor = file.tensors[name]
    kind = tensor.type.name
    if kind not in (*STORED, "BF16", *QUANTIZED):
        raise FabricError(
            f"{name} in {file.path} is stored as {kind}",
            expected=f"one of {', '.join((*STORED, 'BF16', *QUANTIZED))}",
        )
    data = file.read(name, rows if len(tensor.shape) > 1 else ALL_ROWS)
    if kind in QUANTIZED:
        values = _dequantize(data, kind)
    elif kind == "BF16":
        import ml_dtypes

        values = data.view(ml_dtypes.bfloat16)
    else:
        values = data.view(STORED[kind])
    values = values.reshape(-1)[rows] if len(tensor.shape) == 1 else values
    if not is_finite(values):
        raise FabricError(f"{name} in {file.path} has values that are not finite")
    return values


def read_ternary(file: GgufFile, name: str) -> TernaryMatrix:
    """The packed matrix of a linear, whatever type it is stored in.

    Raises:
        FabricError: its values are not -s, 0 and s for one s.
    """
    tensor = file.tensors[name]
    what = f"{name} in {file.path}"
    match tensor.type.name:
        case "TQ1_0":
            return decode_tq1(file.read(name), what)
        case "TQ2_0":
            return decode_tq2(file.read(name), what)
        case "I2_S":
            n, k = tensor.shape
            return decode_i2s(file.read(name)[0], n, k, what)
        case "Q4_0":
            return _from_q4(file.read(name), what)
        case _:
            return _from_floats(file, name, what)


def _dequantize(data: NDArray[np.uint8], kind: str) -> NDArray[np.float32]:
    import gguf

    qtype = gguf.GGMLQuantizationType[kind]
    width = data.shape[1] // gguf.GGML_QUANT_SIZES[qtype][1] * gguf.GGML_QUANT_SIZES[qtype][0]
    values = np.empty((len(data), width), np.float32)
    step = rows_a_chunk(width)
    # What is not finite is found by the caller.
    with np.errstate(all="ignore"):
        for start in range(0, len(data), step):
            part = slice(start, start + step)
            values[part] = gguf.quants.dequantize(data[part], qtype)
    return values


def _from_floats(file: GgufFile, name: str, what: str) -> TernaryMatrix:
    """Of a matrix that was left in 16 bits, or 8, since its rows don't divide into blocks."""
    n, k = file.tensors[name].shape
    scale, parts = None, list[UInt8[np.ndarray, "n k/4"]]()
    step = rows_a_chunk(k)
    for start in range(0, n, step):
        values = read_floats(file, name, slice(start, start + step)).astype(np.float32)
        sizes = np.unique(np.abs(values[values != 0]))
        if sizes.size and scale is None:
            scale = sizes[0]
        if sizes.size > 1 or (sizes.size and sizes[0] != scale):
            raise _not_ternary(what, file.tensors[name].type.name)
        parts.append(pack_codes(np.sign(values)))
    packed = np.concatenate(parts)
    return TernaryMatrix(packed=packed, scale=one_scale(np.array(scale or 0.0), what), k=k)


def _from_q4(data: NDArray[np.uint8], what: str) -> TernaryMatrix:
    """Of a matrix that llama-quantize left in Q4_0.

    A block's scale is -1/8 of its first non-zero weight w: that one's sign becomes nibble 0, zero
    becomes 8, and the other sign, for which there is no 16, becomes 15 and dequantises to -7/8 w.
    """
    n = len(data)
    blocks = data.reshape(n, -1, 18)
    k = blocks.shape[1] * 32
    d = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0].astype(np.float32)
    packed = np.empty((n, k // 4), np.uint8)
    step = rows_a_chunk(k)
    for start in range(0, n, step):
        part = slice(start, start + step)
        halves = blocks[part, :, 2:]
        nibbles = np.concatenate([halves & 15, halves >> 4], axis=-1)
        first, other = nibbles == 0, nibbles == 15
        used = d[part] != 0
        known = (first | other | (nibbles == 8)).all(-1) & first.any(-1)
        if not known[used].all():
            raise _not_ternary(what, "Q4_0")
        signs = first.astype(np.int8) - other.astype(np.int8)
        signs *= np.where(d[part] < 0, 1, -1).astype(np.int8)[..., None]
        signs[~used] = 0
        packed[part] = pack_codes(signs.reshape(len(signs), k))
    return TernaryMatrix(packed=packed, scale=one_scale(np.abs(d) * np.float32(8), what), k=k)


def _not_ternary(what: str, kind: str) -> FabricError:
    return FabricError(
        f"{what} is stored as {kind} in a file of ternary weights, but is not ternary itself",
        expected="weights of -s, 0 and s for one s, as BitNet's are",
        fix="Use the model's original, or a file in which it is TQ1_0 or TQ2_0",
    )
