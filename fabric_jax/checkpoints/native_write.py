"""From a source to a model folder of fabric_jax, one matrix at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fabric_jax.checkpoints.arrays import HostArray, Layout
from fabric_jax.checkpoints.assemble import base_layouts
from fabric_jax.checkpoints.folders import new_folder
from fabric_jax.checkpoints.hub import TOKENIZER_FILES
from fabric_jax.checkpoints.native import (
    CONFIG,
    FILES,
    FORMAT,
    TOKENIZER,
    VERSION,
    WEIGHTS,
    is_model_folder,
)
from fabric_jax.checkpoints.source import ModelSource, TernaryMatrix
from fabric_jax.checkpoints.source_pieces import common_dtype, tensor_pieces
from fabric_jax.checkpoints.tensor_stream import TensorStream, write_streams
from fabric_jax.checkpoints.tokenizer_copy import copy_tokenizer, tokenizer_json
from fabric_jax.errors import FabricError
from fabric_jax.files import write_atomically, write_json
from fabric_jax.models.decoder import DecoderOptions, define_decoder


def write_native(source: ModelSource, folder: str | Path, *, dtype: str | None = None) -> None:
    """Writes a model folder with the linears in the form that the source has them in.

    Args:
        source: of the tensors.
        folder: where; an earlier model folder of fabric_jax is replaced.
        dtype: of the stored floats other than masters, which are float32; None for the source's.

    Raises:
        FabricError: the folder holds something else or can't be written, or a tensor can't be read;
            nothing is left behind.
    """
    folder = Path(folder)
    if (folder / CONFIG).is_file() and not is_model_folder(folder):
        raise FabricError(
            f"{folder} holds a model in another format", fix="Choose a new or empty folder"
        )
    stored = dtype or common_dtype(source)
    definition = define_decoder(source.config, DecoderOptions(mode=source.form, dtype=stored))
    streams = {
        name: _stream(source, name, layout) for name, layout in base_layouts(definition).items()
    }
    with new_folder(folder, replaces=FILES | frozenset(TOKENIZER_FILES)) as staged:
        tokenizer = copy_tokenizer(source.tokenizer_source, staged)
        if tokenizer is not None and not (staged / TOKENIZER).is_file():
            write_atomically(staged / TOKENIZER, tokenizer_json(tokenizer))
        write_streams(staged / WEIGHTS, streams)
        config = {
            "format": FORMAT,
            "version": VERSION,
            "model": source.config.to_dict(),
            "mode": source.form,
            "dtype": stored,
            "act_quant": source.act_quant,
            "tokenizer": None if tokenizer is None else TOKENIZER,
        }
        write_json(staged / CONFIG, config)


def _stream(source: ModelSource, name: str, layout: Layout) -> TensorStream:
    """One tensor of the base tree; those of layers are stacks."""
    dtype = np.dtype(layout.dtype)
    path, _, part = name.removeprefix("layers.").rpartition(".")
    if name.startswith("layers.") and path in source.config.linear_shapes:
        return TensorStream(layout=layout, pieces=lambda: _matrices(source, path, part, dtype))

    def pieces() -> Iterator[HostArray]:
        if not name.startswith("layers."):
            yield from tensor_pieces(source, name, None, layout.shape, dtype)
            return
        for layer in range(layout.shape[0]):
            yield from tensor_pieces(source, name, layer, layout.shape[1:], dtype)

    return TensorStream(layout=layout, pieces=pieces)


def _matrices(
    source: ModelSource, path: str, part: str, dtype: np.dtype[Any]
) -> Iterator[HostArray]:
    """The layers of the ``weight`` or ``scale`` of a linear."""
    for layer in range(source.config.num_layers):
        matrix = source.linear(path, layer)
        if not isinstance(matrix, TernaryMatrix):
            yield matrix.astype(dtype)
        elif part == "scale":
            yield np.asarray(matrix.scale, np.float32)
        else:
            yield matrix.packed
