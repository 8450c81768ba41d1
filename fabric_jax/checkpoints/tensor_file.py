"""safetensors files, read tensor by tensor or a few rows of one."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fabric_jax.checkpoints.arrays import HostArray, Layout, is_finite
from fabric_jax.checkpoints.source import ALL_ROWS
from fabric_jax.errors import FabricError

# https://huggingface.co/docs/safetensors: dtypes of weights, and of the buffers that some models
# keep beside them.
DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "BOOL": "bool",
}
MAX_HEADER_BYTES = 8 << 20
"""100 bytes a tensor; parsed, a header takes some ten times its size."""
DAMAGED = "Copy or download the file again; it is damaged"


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """A safetensors file whose header was read.

    Attributes:
        path: of the file.
        layouts: shape and dtype of each tensor.
        offsets: of the first byte of each tensor in the file.
    """

    path: Path
    layouts: dict[str, Layout]
    offsets: dict[str, int] = field(repr=False)

    def read(self, name: str, rows: slice = ALL_ROWS) -> HostArray:
        """One tensor, or ``rows`` of its first axis; the array is the caller's own.

        Nothing stays mapped: a mapped file would count as memory of the process.

        Raises:
            FabricError: the file is damaged or a value is not finite.
        """
        layout = self.layouts[name]
        start, shape = self.offsets[name], layout.shape
        if rows != ALL_ROWS:
            first, last, step = rows.indices(shape[0])
            assert step == 1
            shape = (max(0, last - first), *shape[1:])
            start += first * math.prod(shape[1:]) * np.dtype(layout.dtype).itemsize
        array: HostArray = np.empty(shape, layout.dtype)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(start)
                _read_into(file, array)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if not is_finite(array):
            raise FabricError(f"{name} in {self.path} has values that are not finite")
        return array


def open_tensors(path: Path) -> TensorFile:
    """Reads the header of a safetensors file, which the library checks against the file's size.

    Raises:
        FabricError: the file is missing, damaged or has a tensor of an unknown dtype.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if (length := _header_bytes(path)) > MAX_HEADER_BYTES:
            raise FabricError(
                f"the header of {path} is too large",
                expected=f"at most {MAX_HEADER_BYTES} bytes",
                found=f"{length} bytes",
                fix=DAMAGED,
            )
        with safe_open(path, framework="np") as handle:
            names: list[str] = list(handle.keys())
            layouts = {name: _layout(path, name, handle.get_slice(name)) for name in names}
        offsets = _offsets(path)
    except FileNotFoundError as error:
        raise FabricError(f"{path} does not exist") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise _unreadable(path, error) from error
    return TensorFile(path=path, layouts=layouts, offsets={name: offsets[name] for name in names})


def write_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Writes arrays by name; not atomic, so the caller's folder must be.

    Raises:
        FabricError: a value is not finite.
        OSError: the file can't be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    for name, array in arrays.items():
        if not is_finite(array):
            raise FabricError(f"{name} has values that are not finite; nothing was saved")
    try:
        # Readers in other libraries ask which one wrote the file; "pt" is what they all accept.
        save_file(arrays, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _header_bytes(path: Path) -> int:
    """What the file says its header's length is; 0 for one too short to say."""
    with path.open("rb") as file:
        return int.from_bytes(file.read(8).ljust(8, b"\0"), "little")


def _offsets(path: Path) -> dict[str, int]:
    """Where each tensor starts; the library, which has checked the header, does not tell."""
    length = _header_bytes(path)
    with path.open("rb") as file:
        file.seek(8)
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}


def _read_into(file: Any, array: HostArray) -> None:
    """Fills ``array``; a read of the operating system stops at 2 GiB."""
    view = array.reshape(-1).view(np.uint8).data
    while view:
        count = file.readinto(view)
        if not count:
            raise OSError("the file ends early")
        view = view[count:]


def _unreadable(path: Path, error: Exception) -> FabricError:
    return FabricError(f"cannot read {path}: {error}", fix=DAMAGED)


def _layout(path: Path, name: str, header: Any) -> Layout:
    dtype = header.get_dtype()
    if dtype not in DTYPES:
        raise FabricError(
            f"{name} in {path} has an unknown dtype",
            expected=f"one of {', '.join(DTYPES)}",
            found=str(dtype),
        )
    return Layout(shape=tuple(header.get_shape()), dtype=DTYPES[dtype])
