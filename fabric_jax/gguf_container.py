"""GGUF files (versions 2 and 3): metadata and places of tensors, read without trusting a number.

Every count, length and offset is compared with the size of the file before anything is allocated
for it, so a damaged or hostile file costs no more than reading what is there. Layout, little-endian
(ggml's docs/gguf.md)::

    "GGUF"  u32 version  u64 tensors  u64 fields
    field   string key   u32 type     value
    tensor  string name  u32 n_dims   u64 dims[n_dims] (fastest first)   u32 type   u64 offset
    zeros up to a multiple of general.alignment, then the tensors' data
    string  u64 length   UTF-8
    array   u32 type     u64 count    values
"""

import math
import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fabric_jax.errors import FabricError

Scalar: TypeAlias = str | int | float | bool
Value: TypeAlias = Scalar | list[Scalar]

STRING, ARRAY, BOOL = 8, 9, 7
FORMATS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    BOOL: "B",
    10: "Q",
    11: "q",
    12: "d",
}
"""``struct`` formats of the numeric field types; booleans are bytes."""

I2_S = 36
"""bitnet.cpp's number for its ternary type; ggml itself no longer uses it."""

MAX_DIMS = 4
MAX_FIELDS = MAX_TENSORS = 1 << 16
MAX_KEY, MAX_NAME = 1 << 16, 256
"""Bytes; ggml itself allows 65,535 for a key and 63 for a tensor's name."""
MAX_ITEMS = 1 << 21
"""Elements of all arrays of the metadata; vocabularies with their merges have under a million."""
MAX_METADATA = 1 << 28
"""Bytes of metadata."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """One metadata field.

    Attributes:
        type: GGUF's number of the value's type.
        element_type: of the elements, where the value is an array.
        value: decoded.
    """

    type: int
    element_type: int | None
    value: Value


class TensorType(NamedTuple):
    """How a tensor is stored: blocks of ``block`` elements in ``bytes`` bytes."""

    number: int
    name: str
    block: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """Where a tensor lies.

    Attributes:
        name: in the file.
        shape: slowest axis first, as numpy has it.
        type: its storage type.
        offset: of its first byte in the file.
        nbytes: that it takes.
    """

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, along the last axis."""
        return self.shape[-1] // self.type.block * self.type.bytes


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """The header of a GGUF file.

    Attributes:
        path: of the file.
        fields: metadata by key.
        tensors: by name.
    """

    path: Path
    fields: dict[str, Field]
    tensors: dict[str, Tensor]

    @cached_property
    def metadata(self) -> dict[str, Value]:
        """The values of the fields."""
        return {key: field.value for key, field in self.fields.items()}

    def read(self, name: str, rows: slice = slice(None)) -> NDArray[np.uint8]:
        """The bytes of a tensor, read-only [rows, bytes of a row], mapped while the array lives.

        Types without rows of their own (I2_S) give one row for the whole tensor.

        Raises:
            FabricError: the file has become shorter.
        """
        tensor = self.tensors[name]
        # A mapping for each call: one for all would keep every page that was read in memory.
        width = tensor.nbytes if tensor.type.number == I2_S else tensor.row_bytes
        start, stop, step = rows.indices(tensor.nbytes // width)
        if step != 1:
            raise ValueError("rows of a tensor are read in order")
        count = max(0, stop - start)
        if not count:
            return np.empty((0, width), np.uint8)
        try:
            data = np.memmap(
                self.path, np.uint8, "r", tensor.offset + start * width, (count, width)
            )
        except (OSError, ValueError) as error:
            raise FabricError(f"cannot read {name} of {self.path}: {error}") from error
        return np.asarray(data)


def read_gguf(path: str | Path) -> GgufFile:
    """Reads the header of a GGUF file.

    Raises:
        FabricError: no GGUF file, one of another version or byte order or in several parts, or one
            whose header is damaged.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise _Malformed(f"{size} bytes, less than any header")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Header(data, size).read(path)
    except FileNotFoundError as error:
        raise FabricError(f"{path} does not exist") from error
    except (OSError, ValueError, struct.error) as error:
        raise FabricError(
            f"cannot read {path}", expected="a GGUF file", found=(str(error) or repr(error))[:300]
        ) from error


class _Malformed(ValueError):
    """What is wrong with a header."""


class _Header:
    """A cursor over a header; every read is checked against the end of the file."""

    def __init__(self, data: mmap.mmap, size: int) -> None:
        self.data, self.size, self.at, self.items = data, size, 0, 0

    def read(self, path: Path) -> GgufFile:
        """Reads everything before the tensors' data."""
        magic = self.take(4)
        if magic != b"GGUF":
            raise _Malformed(f"a file that starts with {magic!r}")
        version = self.number("I")
        if version & 0xFFFF == 0:
            raise _Malformed("a big-endian file")
        if version not in (2, 3):
            raise _Malformed(f"GGUF version {version}; 2 and 3 are supported")
        tensor_count = self.count("tensors", MAX_TENSORS, 24)
        field_count = self.count("fields", MAX_FIELDS, 13)
        fields: dict[str, Field] = {}
        for _ in range(field_count):
            key = self.string("a key", MAX_KEY)
            if key in fields:
                raise _Malformed(f"two fields {key!r}")
            fields[key] = self.field(key)
        alignment = _alignment(fields)
        infos = [self.tensor() for _ in range(tensor_count)]
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, Tensor] = {}
        for info in infos:
            if info.name in tensors:
                raise _Malformed(f"two tensors {info.name!r}")
            tensors[info.name] = _place(info, start, alignment, self.size)
        _require_apart(list(tensors.values()))
        _require_whole(fields)
        return GgufFile(path=path, fields=fields, tensors=tensors)

    def take(self, count: int) -> bytes:
        """The next bytes."""
        end = self.at + count
        if end > self.size or end > MAX_METADATA:
            raise _Malformed(f"a header that goes on after byte {min(self.size, MAX_METADATA)}")
        chunk = self.data[self.at : end]
        self.at = end
        return chunk

    def number(self, code: str) -> int:
        """The next integer."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def count(self, what: str, most: int, least_bytes: int) -> int:
        """A count of things that take ``least_bytes`` each, which the file must have room for."""
        count = self.number("Q")
        if count > most or count * least_bytes > self.size - self.at:
            raise _Malformed(f"{count} {what}, for which there is no room")
        return count

    def string(self, what: str, most: int = MAX_METADATA) -> str:
        """A length and that many bytes of UTF-8."""
        length = self.number("Q")
        if length > most or length > self.size - self.at:
            raise _Malformed(f"{what} of {length} bytes")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Malformed(f"{what} that is no UTF-8") from error

    def field(self, key: str) -> Field:
        """A type and a value."""
        kind = self.number("I")
        if kind == STRING:
            return Field(type=kind, element_type=None, value=self.string(f"{key!r}"))
        if kind in FORMATS:
            return Field(type=kind, element_type=None, value=self.numbers(kind, 1)[0])
        if kind != ARRAY:
            raise _Malformed(f"{key!r} of the unknown type {kind}")
        element = self.number("I")
        if element != STRING and element not in FORMATS:
            what = "an array of arrays" if element == ARRAY else f"of the unknown type {element}"
            raise _Malformed(f"{key!r} with elements that are {what}")
        size = 8 if element == STRING else struct.calcsize(FORMATS[element])
        count = self.count(f"elements of {key!r}", MAX_ITEMS, size)
        self.items += count
        if self.items > MAX_ITEMS:
            raise _Malformed(f"more than {MAX_ITEMS} elements in all arrays")
        value: list[Scalar]
        if element == STRING:
            value = [self.string(f"an element of {key!r}") for _ in range(count)]
        else:
            value = self.numbers(element, count)
        return Field(type=kind, element_type=element, value=value)

    def numbers(self, kind: int, count: int) -> list[Scalar]:
        """Numbers of one type."""
        code = FORMATS[kind]
        values: Sequence[Scalar] = struct.unpack(
            f"<{count}{code}", self.take(count * struct.calcsize(code))
        )
        return [bool(value) for value in values] if kind == BOOL else list(values)

    def tensor(self) -> Tensor:
        """One entry of the table of tensors; its offset still counts from the data's start."""
        name = self.string("a tensor's name", MAX_NAME)
        n_dims = self.number("I")
        if not 1 <= n_dims <= MAX_DIMS:
            raise _Malformed(f"{name!r} with {n_dims} dimensions")
        shape = tuple(self.number("Q") for _ in range(n_dims))[::-1]
        number, offset = self.number("I"), self.number("Q")
        kind = tensor_types().get(number)
        if kind is None:
            raise _Malformed(f"{name!r} of the unknown type {number}")
        nbytes = _nbytes(name, shape, kind)
        return Tensor(name=name, shape=shape, type=kind, offset=offset, nbytes=nbytes)


def tensor_types() -> dict[int, TensorType]:
    """The storage types, by ggml's numbers."""
    from gguf.constants import GGML_QUANT_SIZES

    known = {
        int(kind): TensorType(int(kind), kind.name, *sizes)
        for kind, sizes in GGML_QUANT_SIZES.items()
    }
    return known | {I2_S: TensorType(I2_S, "I2_S", 128, 32)}


def _alignment(fields: dict[str, Field]) -> int:
    """Of the tensors' data, bytes."""
    field = fields.get("general.alignment")
    if field is None:
        return 32
    value = field.value
    if not isinstance(value, int) or value < 1 or value & (value - 1) or value > 1 << 20:
        raise _Malformed(f"general.alignment {str(value)[:40]}")
    return value


def _nbytes(name: str, shape: tuple[int, ...], kind: TensorType) -> int:
    elements = math.prod(shape)
    unit = elements if kind.number == I2_S else shape[-1]
    if not elements or unit % kind.block:
        raise _Malformed(f"{name!r} of shape {list(shape)} in blocks of {kind.block} ({kind.name})")
    # I2_S ends with the scale, in 32 bytes.
    return elements // kind.block * kind.bytes + (32 if kind.number == I2_S else 0)


def _place(info: Tensor, start: int, alignment: int, size: int) -> Tensor:
    if info.offset % alignment:
        raise _Malformed(f"{info.name!r} at an offset that is no multiple of {alignment}")
    offset = start + info.offset
    if offset + info.nbytes > size:
        raise _Malformed(
            f"a file of {size} bytes in which {info.name!r} would end at {offset + info.nbytes}"
        )
    return Tensor(
        name=info.name, shape=info.shape, type=info.type, offset=offset, nbytes=info.nbytes
    )


def _require_apart(tensors: list[Tensor]) -> None:
    """Refuses tensors that share bytes."""
    end, before = 0, ""
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            raise _Malformed(f"{tensor.name!r} and {before!r} in the same place")
        end, before = tensor.offset + tensor.nbytes, tensor.name


def _require_whole(fields: dict[str, Field]) -> None:
    parts = fields.get("split.count")
    if parts is not None and isinstance(parts.value, int) and parts.value > 1:
        raise _Malformed(f"one of {parts.value} parts; join them with llama-gguf-split --merge")
