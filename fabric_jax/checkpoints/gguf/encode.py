"""Matrices of a source as the bytes of a GGUF tensor."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fabric_jax.checkpoints.arrays import HostArray, is_finite
from fabric_jax.checkpoints.gguf.codecs import (
    encode_tq1,
    encode_tq2,
    half_scale,
    rows_a_chunk,
)
from fabric_jax.checkpoints.source import TernaryMatrix
from fabric_jax.checkpoints.ternary import dequantize
from fabric_jax.errors import FabricError

TernaryKind = Literal["TQ1_0", "TQ2_0"]
GgufKind = Literal["TQ1_0", "TQ2_0", "F16", "Q8_0"]
TableKind = Literal["F16", "BF16", "F32"]


def encode_ternary(matrix: TernaryMatrix, kind: TernaryKind, what: str) -> NDArray[np.uint8]:
    """The rows of a TQ1_0 or TQ2_0 tensor; ``what`` names it in messages."""
    return encode_tq1(matrix, what) if kind == "TQ1_0" else encode_tq2(matrix, what)


def dense_values(matrix: TernaryMatrix, what: str) -> HostArray:
    """Codes times scale, in float16."""
    scale = float(half_scale(matrix.scale, what))
    values = np.empty((len(matrix.packed), matrix.k), np.float16)
    step = rows_a_chunk(matrix.k)
    for start in range(0, len(values), step):
        part = slice(start, start + step)
        values[part] = dequantize(matrix.packed[part], scale, matrix.k)
    return values


def encode_dense(values: HostArray, kind: str, what: str) -> HostArray:
    """Floats [..., K] as F32, F16, BF16 or Q8_0 rows.

    Raises:
        FabricError: a value has none in the type.
    """
    if kind == "F32":
        out = values.astype(np.float32)
    elif kind == "F16":
        with np.errstate(over="ignore"):
            out = values.astype(np.float16)
    elif kind == "BF16":
        import ml_dtypes

        out = values.astype(ml_dtypes.bfloat16)
    else:
        return _quantize(values)
    if not is_finite(out):
        raise FabricError(
            f"{what} has values that {kind} can't hold",
            fix="Ask for a wider type" if is_finite(values) else None,
        )
    return out.view(np.uint8) if kind == "BF16" else out


def _quantize(values: HostArray) -> NDArray[np.uint8]:
    import gguf

    qtype = gguf.GGMLQuantizationType.Q8_0
    block, size = gguf.GGML_QUANT_SIZES[qtype]
    out = np.empty((len(values), values.shape[1] // block * size), np.uint8)
    step = rows_a_chunk(values.shape[1])
    for start in range(0, len(values), step):
        part = slice(start, start + step)
        out[part] = gguf.quants.quantize(values[part].astype(np.float32), qtype)
    return out
