"""safetensors files, read tensor by tensor."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fabric_jax.checkpoints.arrays import HostArray, Layout, is_finite
from fabric_jax.errors import FabricError

# https://huggingface.co/docs/safetensors: the dtypes that models and adapters here can have.
DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "U8": "uint8",
    "I8": "int8",
    "I32": "int32",
}


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """A safetensors file whose header was read.

    Attributes:
        path: of the file.
        layouts: shape and dtype of each tensor.
    """

    path: Path
    layouts: dict[str, Layout]

    def read(self, name: str) -> HostArray:
        """One tensor; its part of the file is mapped into memory as long as the array lives.

        Raises:
            FabricError: the file is damaged or a value is not finite.
        """
        # Opened anew for each tensor: one mapping for all would keep every page that was read.
        with _open(self.path) as handle:
            array: HostArray = handle.get_tensor(name)
        if not is_finite(array):
            raise FabricError(f"{name} in {self.path} has values that are not finite")
        return array


def open_tensors(path: Path) -> TensorFile:
    """Reads the header of a safetensors file.

    Raises:
        FabricError: the file is missing, damaged or has a tensor of an unknown dtype.
    """
    with _open(path) as handle:
        names: list[str] = list(handle.keys())
        return TensorFile(
            path=path,
            layouts={name: _layout(path, name, handle.get_slice(name)) for name in names},
        )


@contextmanager
def _open(path: Path) -> Generator[Any]:
    """The library's object for a file, its errors turned into ours."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as handle:
            yield handle
    except FileNotFoundError as error:
        raise FabricError(f"{path} does not exist") from error
    except (OSError, SafetensorError) as error:
        raise FabricError(
            f"cannot read {path}: {error}", fix="Copy or download the file again; it is damaged"
        ) from error


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


def _layout(path: Path, name: str, header: Any) -> Layout:
    dtype = header.get_dtype()
    if dtype not in DTYPES:
        raise FabricError(
            f"{name} in {path} has an unknown dtype",
            expected=f"one of {', '.join(DTYPES)}",
            found=str(dtype),
        )
    return Layout(shape=tuple(header.get_shape()), dtype=DTYPES[dtype])
