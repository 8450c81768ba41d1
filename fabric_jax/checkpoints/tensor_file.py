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
    """An open safetensors file.

    Attributes:
        path: of the file.
        layouts: shape and dtype of each tensor, from the header.
        handle: the library's object.
    """

    path: Path
    layouts: dict[str, Layout]
    handle: Any

    def read(self, name: str) -> HostArray:
        """One tensor, as a view of the mapped file where the library gives one.

        Raises:
            FabricError: a value is not finite.
        """
        array: HostArray = self.handle.get_tensor(name)
        if not is_finite(array):
            raise FabricError(f"{name} in {self.path} has values that are not finite")
        return array


@contextmanager
def open_tensors(path: Path) -> Generator[TensorFile]:
    """Opens a safetensors file, mapped into memory.

    Raises:
        FabricError: the file is missing, damaged or has a tensor of an unknown dtype.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as handle:
            names: list[str] = list(handle.keys())
            layouts = {name: _layout(path, name, handle.get_slice(name)) for name in names}
            yield TensorFile(path=path, layouts=layouts, handle=handle)
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
