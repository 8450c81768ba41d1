"""Model folders of fabric_jax: ``config.json`` and ``model.safetensors``.

The tensors are the base tree as it is in memory, packed weights included, under its paths joined by
dots; stacked layers stay stacked. Packed weights are always stored as ``ternary2``: a model held in
another layout is re-packed as it is written, and again, to whatever is asked for, as it is loaded.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from fabric_kernels import BlockTable, dequantize_blocks

from fabric_jax.checkpoints.arrays import (
    HostArray,
    Layout,
    layout_differences,
    layouts,
    named_leaves,
    summarize,
)
from fabric_jax.checkpoints.assemble import assemble_base, base_layouts, repack_matrix
from fabric_jax.checkpoints.folders import new_folder, read_json_object
from fabric_jax.checkpoints.hub import TOKENIZER_FILES
from fabric_jax.checkpoints.source import ALL_ROWS, TernaryMatrix
from fabric_jax.checkpoints.tensor_file import TensorFile, open_tensors
from fabric_jax.checkpoints.tensor_stream import TensorStream, write_streams
from fabric_jax.checkpoints.ternary import is_packed
from fabric_jax.errors import FabricError, unknown_name
from fabric_jax.files import write_atomically, write_json
from fabric_jax.layers.bit_linear import BaseMode
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderDefinition, DecoderOptions, define_decoder
from fabric_jax.models.initialize import Tree
from fabric_jax.quantization.absmax import ActQuant
from fabric_jax.quantization.ste_options import SteOptions, check_packable

FORMAT = "fabric_jax"
VERSION = 1
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
FILES = frozenset({CONFIG, WEIGHTS, TOKENIZER})
KEYS = ("format", "version", "model", "mode", "dtype", "act_quant", "tokenizer")
STE = "ste"
"""The one key that may be missing: only masters that can't be packed have it."""


@dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """What ``config.json`` says.

    Attributes:
        model: what the model is.
        mode: the form of its linears' weights.
        dtype: of its other weights.
        act_quant: the quantiser it was trained with.
        tokenizer: the tokenizer file in the folder; None for a model of bytes or of none.
        ste: what its master weights were trained with.
    """

    model: ModelConfig
    mode: BaseMode
    dtype: str
    act_quant: ActQuant
    tokenizer: Path | None
    ste: SteOptions = field(default_factory=SteOptions)


def save_model(
    folder: str | Path,
    definition: DecoderDefinition,
    base: Tree,
    *,
    tokenizer_json: bytes | None,
    tokenizer_settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model folder; it appears whole or not at all.

    A folder holds tables and plain linears of floats. A quantised one is written as the floats that
    its codes stand for, not as those that it was made from, which are gone.

    Args:
        folder: where; an earlier model folder there is replaced.
        definition: of the decoder, whose adapter is not saved.
        base: its weights.
        tokenizer_json: contents of the tokenizer's file, if the model has one.
        tokenizer_settings: what else is to lie beside it as JSON, by file name.

    Raises:
        FabricError: ``base`` does not fit ``definition``, or the folder can't be written.
    """
    options = definition.options
    wrong = layout_differences(base_layouts(definition), layouts(base))
    if wrong:
        raise FabricError(
            f"these weights are not those of {definition.config.name}: {summarize(wrong)}"
        )
    base = _float_tables(base, definition)
    # A folder has one float dtype; what memory holds narrower is widened, which loses nothing.
    plain = replace(options, embedding_dtype=None, packing="ternary2", float_format="same")
    stored = base_layouts(define_decoder(definition.config, plain))
    leaves = named_leaves(base)
    with new_folder(folder, replaces=FILES | frozenset(TOKENIZER_FILES)) as staged:
        streams = {n: _stream(definition, n, leaves, layout) for n, layout in stored.items()}
        write_streams(staged / WEIGHTS, streams)
        if tokenizer_json is not None:
            write_atomically(staged / TOKENIZER, tokenizer_json)
        for name, settings in (tokenizer_settings or {}).items():
            write_json(staged / name, settings)
        config = {
            "format": FORMAT,
            "version": VERSION,
            "model": definition.config.to_dict(),
            "mode": options.mode,
            "dtype": jnp.dtype(options.dtype).name,
            "act_quant": options.act_quant,
            "tokenizer": None if tokenizer_json is None else TOKENIZER,
        }
        if options.mode == "master" and options.ste.beyond_packed:
            config[STE] = asdict(options.ste)
        write_json(staged / CONFIG, config)


def _stream(
    definition: DecoderDefinition, name: str, leaves: dict[str, Any], layout: Layout
) -> TensorStream:
    """A leaf as it is stored: linears in another format in memory one matrix at a time."""
    options = definition.options
    path = name.removeprefix("layers.").removesuffix(".weight")
    shape = definition.config.linear_shapes.get(path)

    def pieces() -> Iterator[HostArray]:
        leaf = leaves.get(name)
        if leaf is None:
            assert shape is not None
            codes, scales = (leaves[f"layers.{path}.{part}"] for part in ("codes", "scales"))
            for layer in range(codes.shape[0]):
                matrix = BlockTable(codes[layer], scales[layer], shape[1])
                yield np.asarray(dequantize_blocks(matrix, layout.dtype))
        elif shape is None or not options.frozen:
            yield np.asarray(leaf if leaf.dtype == layout.dtype else leaf.astype(layout.dtype))
        elif options.mode == "float":
            for layer in range(leaf.shape[0]):
                yield np.asarray(leaf[layer].astype(layout.dtype))
        elif options.packing == "ternary2":
            yield np.asarray(leaf)
        else:
            for layer in range(leaf.shape[0]):
                yield repack_matrix(leaf[layer], shape[1], options.packing, "ternary2")

    return TensorStream(layout=layout, pieces=pieces)


def _float_tables(base: Tree, definition: DecoderDefinition) -> Tree:
    """The tree with float32 tables in place of quantised ones."""

    def widen(table: Tree | jax.Array) -> jax.Array:
        if not isinstance(table, dict):
            return table
        k = definition.config.hidden_size
        return dequantize_blocks(BlockTable(table["codes"], table["scales"], k))

    return base | {name: widen(base[name]) for name in ("embedding", "head") if name in base}


def is_model_folder(folder: Path) -> bool:
    """Whether ``save_model`` wrote this folder."""
    path = folder / CONFIG
    return path.is_file() and read_json_object(path).get("format") == FORMAT


def read_model_config(folder: Path) -> FolderConfig:
    """Reads and checks ``config.json``.

    Raises:
        FabricError: a key is unknown, missing or has a value that it can't have.
    """
    path = folder / CONFIG
    stored = read_json_object(path)
    if stored.get("format") != FORMAT:
        raise FabricError(f"{path} is not of a fabric_jax model")
    if stored.get("version") != VERSION:
        raise FabricError(
            f"{path} was written by another version of fabric_jax",
            expected=f"version {VERSION}",
            found=str(stored.get("version")),
        )
    for key in stored:
        if key not in (*KEYS, STE):
            raise unknown_name(f"key in {path}", key, KEYS)
    missing = [key for key in KEYS if key not in stored]
    if missing or not isinstance(stored["model"], dict):
        raise FabricError(f"{path} lacks {', '.join(missing) or 'a model'}")
    for key, known in (
        ("mode", get_args(BaseMode)),
        ("act_quant", get_args(ActQuant)),
        ("dtype", ("float32", "bfloat16", "float16")),
        ("tokenizer", (None, TOKENIZER)),
    ):
        if stored[key] not in known:
            raise unknown_name(f"{key} in {path}", str(stored[key]), map(str, known))
    return FolderConfig(
        model=ModelConfig.from_dict(cast(dict[str, Any], stored["model"])),
        mode=stored["mode"],
        dtype=stored["dtype"],
        act_quant=stored["act_quant"],
        tokenizer=None if stored["tokenizer"] is None else folder / TOKENIZER,
        ste=_read_ste(stored.get(STE, {}), path),
    )


def _read_ste(stored: object, path: Path) -> SteOptions:
    try:
        return SteOptions(**cast(dict[str, Any], stored))
    except TypeError as error:
        raise FabricError(f"{STE} in {path} is no description of quantisers: {error}") from error


@dataclass(frozen=True, kw_only=True)
class NativeSource:
    """A checked model folder, as ``checkpoints.source.ModelSource`` says.

    Attributes:
        stored: what its configuration says.
        file: its tensors.
        origin: for messages.
    """

    stored: FolderConfig
    file: TensorFile
    origin: str

    @property
    def config(self) -> ModelConfig:
        """See ``ModelSource``."""
        return self.stored.model

    @property
    def form(self) -> BaseMode:
        """See ``ModelSource``."""
        return self.stored.mode

    @property
    def act_quant(self) -> ActQuant:
        """See ``ModelSource``."""
        return self.stored.act_quant

    @property
    def tokenizer_source(self) -> str:
        """See ``ModelSource``."""
        return "" if self.stored.tokenizer is None else str(self.stored.tokenizer)

    def linear(self, path: str, layer: int) -> TernaryMatrix | HostArray:
        """See ``ModelSource``."""
        name = f"layers.{path}.weight"
        weight = self._layer(name, layer)
        if self.form != "packed":
            return weight
        if not is_packed(weight):
            raise FabricError(
                f"{name} in {self.file.path} has bytes that are no packed ternary codes"
            )
        scale = float(self._layer(f"layers.{path}.scale", layer))
        if scale <= 0:
            raise FabricError(
                f"layers.{path}.scale in {self.file.path} is no scale",
                expected="a positive number",
                found=str(scale),
            )
        return TernaryMatrix(packed=weight, scale=scale, k=self.config.linear_shapes[path][1])

    def tensor(self, name: str, layer: int | None = None, *, rows: slice = ALL_ROWS) -> HostArray:
        """See ``ModelSource``."""
        return self.file.read(name, rows) if layer is None else self._layer(name, layer)[rows]

    def _layer(self, name: str, layer: int) -> HostArray:
        return self.file.read(name, slice(layer, layer + 1))[0]


def open_native(folder: str | Path, *, any_ste: bool = False) -> NativeSource:
    """Opens what ``save_model`` wrote.

    Args:
        folder: the model folder.
        any_ste: whether to take masters that were trained in a way that packed weights can't
            express; who does reads ``stored.ste``.

    Raises:
        FabricError: the folder is damaged, its tensors are not those of its model (the differing
            ones are named), or they are such masters.
    """
    folder = Path(folder)
    stored = read_model_config(folder)
    if not any_ste:
        check_packable(stored.ste, str(folder))
    file = open_tensors(folder / WEIGHTS)
    plain = DecoderOptions(mode=stored.mode, dtype=stored.dtype, act_quant=stored.act_quant)
    expected = base_layouts(define_decoder(stored.model, plain))
    if wrong := layout_differences(expected, file.layouts):
        raise FabricError(
            f"{file.path} does not hold the weights of {stored.model.name}: {summarize(wrong)}"
        )
    return NativeSource(stored=stored, file=file, origin=str(folder))


def load_model_folder(
    folder: str | Path, options: DecoderOptions | None = None
) -> tuple[DecoderDefinition, Tree]:
    """Loads what ``save_model`` wrote, one tensor at a time.

    Args:
        folder: the model folder.
        options: how to compute with the model; None for what it was saved with and no adapter. The
            mode must be the stored one; weights are cast to the dtype.

    Returns:
        The decoder's definition and its base weights, on the default device.

    Raises:
        FabricError: the folder is damaged, its tensors are not those of its model (the differing
            ones are named), or the mode is another one.
    """
    source = open_native(folder, any_ste=True)
    stored = source.stored
    plain = DecoderOptions(
        mode=stored.mode, dtype=stored.dtype, act_quant=stored.act_quant, ste=stored.ste
    )
    definition = define_decoder(stored.model, options or plain)
    return definition, assemble_base(definition, source)
