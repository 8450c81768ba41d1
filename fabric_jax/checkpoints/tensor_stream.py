"""safetensors files written piece by piece, so that no tensor need exist as a whole.

The library's own writer wants all arrays at once. The format (huggingface.co/docs/safetensors) is
eight bytes of header length, a JSON header padded with spaces, and the tensors without gaps.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fabric_jax.checkpoints.arrays import HostArray, Layout, is_finite
from fabric_jax.checkpoints.tensor_file import DTYPES
from fabric_jax.errors import FabricError

ALIGNMENT = 8
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class TensorStream:
    """A tensor to be written.

    Attributes:
        layout: its shape and dtype.
        pieces: gives its elements in C order, in arrays of any shape and of its dtype.
    """

    layout: Layout
    pieces: Callable[[], Iterable[HostArray]]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.layout.shape) * np.dtype(self.layout.dtype).itemsize


def write_streams(path: Path, tensors: Mapping[str, TensorStream]) -> None:
    """Writes a file; not atomic, so the caller's folder must be.

    Raises:
        FabricError: a value is not finite.
        ValueError: the pieces of a tensor are not what its layout says.
        OSError: the file can't be written.
    """
    # Wide elements first: then all of them lie where their dtype wants them in a mapped file.
    order = sorted(tensors, key=lambda name: -np.dtype(tensors[name].layout.dtype).itemsize)
    with path.open("wb") as file:
        file.write(_header({name: tensors[name] for name in order}))
        for name in order:
            tensor, written = tensors[name], 0
            for piece in tensor.pieces():
                if piece.dtype != np.dtype(tensor.layout.dtype):
                    raise ValueError(f"a piece of {name} is {piece.dtype}, not {tensor.layout}")
                if not is_finite(piece):
                    raise FabricError(f"{name} has values that are not finite; nothing was saved")
                # A view as bytes: bfloat16 arrays have no buffer interface of their own.
                file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
                written += piece.nbytes
            if written != tensor.nbytes:
                raise ValueError(f"{name} has {written} bytes instead of {tensor.nbytes}")


def _header(tensors: Mapping[str, TensorStream]) -> bytes:
    # Readers in other libraries ask which one wrote the file; "pt" is what they all accept.
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.nbytes
        entries[name] = {
            "dtype": CODES[tensor.layout.dtype],
            "shape": list(tensor.layout.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
