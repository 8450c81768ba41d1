"""The header of GGUF files: against the gguf package, and against files that lie."""

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fabric_jax.errors import FabricError
from fabric_jax.gguf_container import read_gguf, tensor_types

Kind = gguf.GGUFValueType
INTEGERS = {
    Kind.UINT8: (0, 255),
    Kind.INT8: (-128, 127),
    Kind.UINT16: (0, 65535),
    Kind.INT16: (-32768, 32767),
    Kind.UINT32: (0, 2**32 - 1),
    Kind.INT32: (-(2**31), 2**31 - 1),
    Kind.UINT64: (0, 2**64 - 1),
    Kind.INT64: (-(2**63), 2**63 - 1),
}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SCALARS = st.one_of(
    *(
        st.tuples(st.just(kind), st.integers(least, most))
        for kind, (least, most) in INTEGERS.items()
    ),
    st.tuples(st.just(Kind.FLOAT32), st.floats(allow_nan=False, width=32)),
    st.tuples(st.just(Kind.FLOAT64), st.floats(allow_nan=False)),
    st.tuples(st.just(Kind.BOOL), st.booleans()),
    st.tuples(st.just(Kind.STRING), TEXT),
)
LISTS = st.one_of(
    *(
        st.tuples(st.just(kind), st.lists(st.integers(least, most), min_size=1, max_size=9))
        for kind, (least, most) in INTEGERS.items()
    ),
    st.tuples(st.just(Kind.STRING), st.lists(TEXT, min_size=1, max_size=9)),
    st.tuples(st.just(Kind.BOOL), st.lists(st.booleans(), min_size=1, max_size=9)),
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    scalars=st.lists(SCALARS, max_size=6),
    lists=st.lists(LISTS, max_size=4),
    shapes=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), max_size=5),
    alignment=st.sampled_from([None, 1, 8, 64, 4096]),
)
def test_what_the_package_writes_is_read(tmp_path: Path, scalars, lists, shapes, alignment) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    expected: dict[str, object] = {"general.architecture": "llama"}
    for number, (kind, value) in enumerate(scalars):
        writer.add_key_value(f"scalar.{number}", value, kind)
        expected[f"scalar.{number}"] = value
    for number, (kind, values) in enumerate(lists):
        writer.add_key_value(f"list.{number}", values, Kind.ARRAY, kind)
        expected[f"list.{number}"] = values
    arrays = {}
    for number, shape in enumerate(shapes):
        dtype = [np.float32, np.float16, np.int8][number % 3]
        arrays[f"t{number}"] = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
        writer.add_tensor(f"t{number}", arrays[f"t{number}"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(path)
    values = dict(file.metadata)
    values.pop("general.alignment", None)
    assert values == expected
    assert file.tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        assert file.tensors[name].shape == array.shape
        assert file.read(name).tobytes() == array.tobytes()


def test_rows_are_read_alone(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.float32).reshape(6, 4)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("w", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(tmp_path / "m.gguf")
    assert file.read("w", slice(2, 5)).tobytes() == values[2:5].tobytes()
    assert file.read("w", slice(5, 99)).tobytes() == values[5:].tobytes()
    assert file.read("w", slice(3, 3)).shape == (0, 16)
    assert not file.read("w").flags.writeable
    (tmp_path / "m.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:-64])
    with pytest.raises(FabricError, match="cannot read w of"):
        file.read("w")


def test_types_are_the_packages() -> None:
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        assert tensor_types()[int(kind)] == (int(kind), kind.name, block, size)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def field(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, body: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + body


def tensor(name: str, dims: list[int], kind: int, offset: int) -> bytes:
    head = text(name) + struct.pack("<I", len(dims))
    return head + b"".join(struct.pack("<Q", d) for d in dims) + struct.pack("<IQ", kind, offset)


def whole(
    fields: list[bytes],
    tensors: list[bytes],
    data: int = 64,
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A file; ``counts`` are what it claims to have of tensors and fields."""
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(fields))))
    head += b"".join(fields) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


HUGE = 2**63
LIES = {
    "empty": (b"", "0 bytes"),
    "magic": (b"GGML" + bytes(60), "starts with b'GGML'"),
    "version": (whole([], [], version=1), "GGUF version 1"),
    "future": (whole([], [], version=4), "GGUF version 4"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(60), "big-endian"),
    "tensors": (whole([], [], counts=(HUGE, 0)), f"{HUGE} tensors, for which there is no room"),
    "fields": (whole([], [], counts=(0, 2**32)), "4294967296 fields, for which there is no room"),
    "key": (whole([struct.pack("<Q", HUGE) + bytes(40)], []), f"a key of {HUGE} bytes"),
    "string": (whole([field("a", 8, struct.pack("<Q", HUGE))], []), f"'a' of {HUGE} bytes"),
    "array": (whole([field("a", 9, array(4, HUGE))], []), f"{HUGE} elements of 'a'"),
    "strings": (whole([field("a", 9, array(8, 10**6))], []), "1000000 elements of 'a'"),
    "nested": (whole([field("a", 9, array(9, 1, array(9, 1)))], []), "an array of arrays"),
    "type": (whole([field("a", 13, bytes(8))], []), "'a' of the unknown type 13"),
    "element": (whole([field("a", 9, array(77, 1))], []), "of the unknown type 77"),
    "utf-8": (whole([field("a", 8, struct.pack("<Q", 2) + b"\xff\xfe")], []), "no UTF-8"),
    "twice": (whole([field("a", 0, b"\1")] * 2, []), "two fields 'a'"),
    "alignment": (
        whole([field("general.alignment", 4, struct.pack("<I", 24))], []),
        "general.alignment 24",
    ),
    "parts": (
        whole([field("split.count", 2, struct.pack("<H", 3))], []),
        "one of 3 parts; join them",
    ),
    "dims": (whole([], [tensor("w", [1] * 9, 0, 0)]), "'w' with 9 dimensions"),
    "no dims": (whole([], [tensor("w", [], 0, 0)]), "'w' with 0 dimensions"),
    "zero": (whole([], [tensor("w", [0, 4], 0, 0)]), "'w' of shape"),
    "block": (whole([], [tensor("w", [48, 2], 35, 0)]), "'w' of shape .* in blocks of 256"),
    "kind": (whole([], [tensor("w", [4], 99, 0)]), "'w' of the unknown type 99"),
    "overflow": (whole([], [tensor("w", [2**33, 2**33], 0, 0)]), "would end at"),
    "offset": (whole([], [tensor("w", [4], 0, 2**63)]), "would end at"),
    "odd": (whole([], [tensor("w", [4], 0, 8)]), "no multiple of 32"),
    "short": (whole([], [tensor("w", [17], 0, 0)], 64), "would end at"),
    "two": (whole([], [tensor("w", [4], 0, 0), tensor("w", [4], 0, 32)]), "two tensors 'w'"),
    "same place": (
        whole([], [tensor("v", [9], 0, 0), tensor("w", [4], 0, 32)]),
        "'w' and 'v' in the same place",
    ),
    "cut": (whole([field("a", 8, text("x" * 40))], [])[:60], "of 40 bytes|goes on after"),
}


@pytest.mark.parametrize("name", list(LIES))
def test_lies_cost_nothing(tmp_path: Path, name: str) -> None:
    content, message = LIES[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    tensor_types()  # Imports the package, which is none of the reader's memory.
    tracemalloc.start()
    try:
        with pytest.raises(FabricError, match=message):
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(FabricError, match="does not exist"):
        read_gguf(tmp_path / "none.gguf")
    with pytest.raises(FabricError, match="cannot read"):
        read_gguf(tmp_path)


def test_version_2_is_read(tmp_path: Path) -> None:
    content = whole([field("a", 7, b"\2")], [tensor("w", [2, 2], 0, 0)], version=2)
    (tmp_path / "m.gguf").write_bytes(content)
    file = read_gguf(tmp_path / "m.gguf")
    assert file.metadata == {"a": True}
    assert file.tensors["w"].shape == (2, 2)
