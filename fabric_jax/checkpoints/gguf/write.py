"""Models to GGUF files, tensor by tensor."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np

from fabric_jax.checkpoints.arrays import HostArray
from fabric_jax.checkpoints.assemble import in_form
from fabric_jax.checkpoints.gguf.architecture import choose_architecture, warn_of_activation
from fabric_jax.checkpoints.gguf.encode import (
    GgufKind,
    TableKind,
    TernaryKind,
    dense_values,
    encode_dense,
    encode_ternary,
)
from fabric_jax.checkpoints.gguf.metadata import (
    ACT_QUANT_KEY,
    TERNARY_KEY,
    config_fields,
    rope_divisors,
)
from fabric_jax.checkpoints.gguf.names import (
    BITNET,
    BITNET_CPP,
    LLAMA,
    ROPE_FREQUENCIES,
    linear_name,
    norm_shapes,
    table_shapes,
    tensor_name,
    to_pairs,
    turned_heads,
)
from fabric_jax.checkpoints.gguf.padding import NORM_AXES, Padding, plan_padding
from fabric_jax.checkpoints.gguf.read import QUERY_SCALES, ROUNDING
from fabric_jax.checkpoints.gguf.rounding import multiply
from fabric_jax.checkpoints.gguf.tokenizer_fields import tokenizer_fields
from fabric_jax.checkpoints.source import ModelSource, TernaryMatrix
from fabric_jax.errors import FabricError, unknown_name
from fabric_jax.files import new_file
from fabric_jax.gguf_container import Field

if TYPE_CHECKING:
    import gguf

# llama.h's llama_ftype.
FILE_TYPES = {"F16": 1, "Q8_0": 7, "TQ1_0": 36, "TQ2_0": 37}
BLOCKS = {"TQ1_0": (256, 54), "TQ2_0": (256, 66), "Q8_0": (32, 34), "BF16": (1, 2)}
ITEM_TYPES: dict[str, type] = {"F32": np.float32, "F16": np.float16}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor to be written.

    Attributes:
        name: in the file.
        shape: of the values.
        kind: the storage type.
        make: gives its elements, or the bytes of its rows.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    make: Callable[[], HostArray]


def write_gguf(
    path: str | Path,
    source: ModelSource,
    *,
    kind: GgufKind,
    architecture: str | None = None,
    tables: TableKind = "F16",
    tokenizer_source: str | None = None,
) -> None:
    """Writes a model; the file appears whole or not at all.

    Ternary matrices become codes and the scale in float16; TQ1_0 and TQ2_0 hold nothing else. Where
    rows don't divide into blocks the model is padded with zeros, which ``open_gguf`` undoes.

    Args:
        path: the file; an earlier one is replaced.
        source: the model; masters are quantised by the rule of the forward pass.
        kind: of the linears. Q8_0 falls back to F16 where rows don't divide by 32.
        architecture: see ``choose_architecture``; None for llama.cpp's.
        tables: type of embedding and head.
        tokenizer_source: in place of the source's own.

    Raises:
        FabricError: the format or the runtimes that read it can't represent the model, or the file
            can't be written; nothing is left behind.
    """
    if kind not in get_args(GgufKind):
        raise unknown_name("GGUF type", kind, get_args(GgufKind))
    if source.form == "master":
        source = in_form(source, "packed")
    writer = _Writer(
        source=source,
        kind=kind,
        architecture=choose_architecture(source.config, architecture),
        tables=tables,
    )
    tokens = source.tokenizer_source if tokenizer_source is None else tokenizer_source
    vocabulary = tokenizer_fields(tokens, source.config.vocab_size)
    entries, own = writer.entries()
    warn_of_activation(source.config, writer.architecture)
    fields = writer.fields() | own
    with new_file(path) as temporary:
        write_container(temporary, writer.architecture, fields, vocabulary, entries)


def write_container(
    path: Path,
    architecture: str,
    fields: Mapping[str, Any],
    more: Mapping[str, Field],
    entries: list[Entry],
) -> None:
    """Writes a file: metadata by their Python types, fields as they are, then the tensors.

    Raises:
        OSError: the file can't be written.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    try:
        for key, value in fields.items():
            _add(writer, key, value)
        for key, field in more.items():
            if field.value != []:
                kind, element = field.type, field.element_type
                writer.add_key_value(
                    key,
                    field.value,
                    gguf.GGUFValueType(kind),
                    None if element is None else gguf.GGUFValueType(element),
                )
        for entry in entries:
            _announce(writer, entry)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(np.ascontiguousarray(entry.make()))
        writer.flush()
    finally:
        writer.close()


@dataclass(frozen=True, kw_only=True)
class _Writer:
    """How one model goes into one file."""

    source: ModelSource
    kind: GgufKind
    architecture: str
    tables: TableKind

    def __post_init__(self) -> None:
        config = self.source.config
        if self.kind in get_args(TernaryKind) and self.source.form == "float":
            raise FabricError(
                f"{self.source.origin} holds 16-bit weights, which {self.kind} can't",
                expected="F16 or Q8_0",
            )
        square = config.num_heads * config.head_dim == config.hidden_size
        if self._square and not square and self.padding is None:
            raise FabricError(
                f"{config.name} can't be written as {self.kind}: arch {self.architecture} wants as "
                "many channels in all heads as in the hidden state",
                found=f"{config.num_heads} · {config.head_dim} and {config.hidden_size}",
                fix="TQ1_0 and TQ2_0 are padded to that" if self.source.form != "float" else None,
            )
        if self.architecture in BITNET_CPP and self.padding is not None:
            raise FabricError(
                f"{config.name} needs padding, which bitnet.cpp can't run",
                fix=f"Write arch {BITNET}, or F16",
            )
        llama3 = config.rope_scaling is not None and config.rope_scaling.kind == "llama3"
        if llama3 and self.architecture != LLAMA:
            raise FabricError(f"arch {self.architecture} has no Llama 3 rope scaling")

    @property
    def _square(self) -> bool:
        return self.architecture in (BITNET, *BITNET_CPP)

    @property
    def padding(self) -> Padding | None:
        """What the type of the linears takes."""
        if self.kind not in get_args(TernaryKind):
            return None
        return plan_padding(self.source.config, square=self._square)

    def fields(self) -> dict[str, Any]:
        """The metadata without the tokenizer's."""
        config, padding = self.source.config, self.padding
        stored = config if padding is None else padding.padded
        fields = {
            "general.type": "model",
            "general.name": config.name,
            "general.file_type": FILE_TYPES[self.kind],
            "general.quantization_version": 2,
            **config_fields(stored, self.architecture),
            f"{self.architecture}.rope.dimension_count": config.head_dim,
            TERNARY_KEY: self.source.form != "float",
            ACT_QUANT_KEY: self.source.act_quant,
        }
        return fields if padding is None else fields | padding.fields()

    def entries(self) -> tuple[list[Entry], dict[str, Any]]:
        """All tensors, and the metadata that undo the padding's rounding."""
        own: dict[str, Any] = {}
        config = self.source.config
        entries = [
            self._gain(name, None, own) if name.endswith(".gain") else self._table(name)
            for name in table_shapes(config)
        ]
        divisors = rope_divisors(config)
        if divisors is not None:
            entries.append(_ready(ROPE_FREQUENCIES, divisors))
        for layer in range(config.num_layers):
            entries += [self._gain(name, layer, own) for name in norm_shapes(config)]
            entries += [self._linear(path, layer) for path in config.linear_shapes]
        padding = self.padding
        if padding is not None and padding.query_factor != 1:
            layers = range(config.num_layers)
            own[QUERY_SCALES] = [
                float(np.float32(self._matrix("attention.q", layer).scale)) for layer in layers
            ]
        return entries, own

    def _table(self, name: str) -> Entry:
        config, padding = self.source.config, self.padding
        width = config.hidden_size if padding is None else padding.hidden_size

        def make() -> HostArray:
            table = self.source.tensor(name)
            if padding is not None:
                table = padding.widen(table, ("vocabulary", "hidden"))
            return encode_dense(table, self.tables, name)

        shape = (config.vocab_size, width)
        return Entry(name=tensor_name(name, None), shape=shape, kind=self.tables, make=make)

    def _gain(self, name: str, layer: int | None, own: dict[str, Any]) -> Entry:
        stored = tensor_name(name, layer)
        gain = self.source.tensor(name, layer).astype(np.float32)
        gain = gain + np.float32(self.source.config.norm_offset)
        if self.padding is not None:
            axis = NORM_AXES[name]
            gain, missed = multiply(gain, self.padding.gain_factor(axis))
            if missed.any():
                own[ROUNDING + stored] = missed.tolist()
            gain = self.padding.widen(gain, (axis,))
        return _ready(stored, gain)

    def _linear(self, path: str, layer: int) -> Entry:
        config = self.source.config if self.padding is None else self.padding.padded
        shape = config.linear_shapes[path]
        kind = "F16" if self.kind == "Q8_0" and shape[1] % BLOCKS["Q8_0"][0] else self.kind
        heads = turned_heads(self.architecture, path, self.source.config)
        name = linear_name(path, layer)
        make = partial(self._rows, path, layer, heads, kind, name)
        return Entry(name=name, shape=shape, kind=kind, make=make)

    def _matrix(self, path: str, layer: int) -> TernaryMatrix:
        matrix = self.source.linear(path, layer)
        assert isinstance(matrix, TernaryMatrix)
        return matrix

    def _rows(self, path: str, layer: int, heads: int, kind: str, name: str) -> HostArray:
        """The bytes or elements of a linear."""
        if self.source.form == "float":
            matrix = cast(HostArray, self.source.linear(path, layer))
            return encode_dense(to_pairs(matrix, heads), kind, name)
        ternary = self._matrix(path, layer)
        ternary = replace(ternary, packed=to_pairs(ternary.packed, heads))
        if kind not in get_args(TernaryKind):
            return encode_dense(dense_values(ternary, name), kind, name)
        if self.padding is not None:
            ternary = self.padding.widen_matrix(path, ternary)
            if path == "attention.q":
                ternary = replace(ternary, scale=ternary.scale * self.padding.query_factor)
        return encode_ternary(ternary, cast(TernaryKind, kind), name)


def _ready(name: str, values: HostArray) -> Entry:
    """A small tensor in float32."""
    return Entry(
        name=name,
        shape=values.shape,
        kind="F32",
        make=lambda: encode_dense(values, "F32", name),
    )


def _announce(writer: "gguf.GGUFWriter", entry: Entry) -> None:
    """Adds a tensor to the header."""
    import gguf

    qtype = gguf.GGMLQuantizationType[entry.kind]
    if entry.kind in ITEM_TYPES:
        item = np.dtype(ITEM_TYPES[entry.kind])
        writer.add_tensor_info(
            entry.name, entry.shape, item, math.prod(entry.shape) * item.itemsize, qtype
        )
        return
    block, size = BLOCKS[entry.kind]
    stored = (*entry.shape[:-1], entry.shape[-1] // block * size)
    writer.add_tensor_info(entry.name, stored, np.dtype(np.uint8), math.prod(stored), qtype)


def _add(writer: "gguf.GGUFWriter", key: str, value: Any) -> None:
    """Adds a field of the type that llama.cpp expects for a Python value."""
    import gguf

    kinds = gguf.GGUFValueType
    if isinstance(value, list):
        numbers = cast(list[Any], value)
        element = kinds.FLOAT32 if isinstance(numbers[0], float) else kinds.INT8
        writer.add_key_value(key, numbers, kinds.ARRAY, element)
        return
    kind = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}
    writer.add_key_value(key, value, kind[type(value)])
