"""What writers of folders ask of a source: one dtype for all floats, tables piece by piece."""

import math
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from fabric_jax.checkpoints.arrays import HostArray
from fabric_jax.checkpoints.source import ModelSource, TernaryMatrix

BLOCK_BYTES = 1 << 25
"""Of a table that is read at once."""


def common_dtype(source: ModelSource) -> str:
    """``bfloat16`` where all floats of a source are, else ``float32``, which holds all others."""
    found = {
        source.tensor("embedding", rows=slice(0, 1)).dtype,
        source.tensor("final_norm.gain").dtype,
        source.tensor("layers.attention_norm.gain", 0).dtype,
    }
    if source.form == "float":
        matrix = source.linear("attention.k", 0)
        assert not isinstance(matrix, TernaryMatrix)
        found.add(matrix.dtype)
    return "bfloat16" if found == {np.dtype(ml_dtypes.bfloat16)} else "float32"


def tensor_pieces(
    source: ModelSource,
    name: str,
    layer: int | None,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
) -> Iterator[HostArray]:
    """Rows of one tensor, some at a time, in another dtype.

    Args:
        source: of the tensor.
        name: in the base tree.
        layer: of names that start with ``layers.``.
        shape: of the tensor in one layer.
        dtype: to cast to.
    """
    step = max(1, BLOCK_BYTES // (math.prod(shape[1:]) * dtype.itemsize))
    for start in range(0, shape[0], step):
        rows = slice(start, min(start + step, shape[0]))
        yield source.tensor(name, layer, rows=rows).astype(dtype)
