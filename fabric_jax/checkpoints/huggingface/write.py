"""From a source to a model folder that transformers loads, one tensor at a time."""

import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fabric_jax.checkpoints.arrays import HostArray, Layout
from fabric_jax.checkpoints.folders import new_folder, read_json_object
from fabric_jax.checkpoints.hub import TOKENIZER_FILES
from fabric_jax.checkpoints.huggingface.names import HEAD, SCALE, SUB_NORMS, Names
from fabric_jax.checkpoints.huggingface.write_config import (
    family_of,
    model_settings,
    multiplies_scale,
)
from fabric_jax.checkpoints.source import ModelSource, TernaryMatrix
from fabric_jax.checkpoints.source_pieces import common_dtype, tensor_pieces
from fabric_jax.checkpoints.tensor_stream import TensorStream, write_streams
from fabric_jax.checkpoints.ternary import to_quarter_rows, unpack_codes
from fabric_jax.checkpoints.tokenizer_copy import GENERATION, copy_tokenizer, special_tokens
from fabric_jax.errors import FabricError
from fabric_jax.files import write_json
from fabric_jax.layers.bit_linear import BaseMode
from fabric_jax.models.config import ModelConfig

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
FILES = frozenset({CONFIG, WEIGHTS, INDEX, GENERATION, *TOKENIZER_FILES})
"""What a folder holds beside shards."""
SHARD_BYTES = 5_000_000_000
CODES_PER_BYTE = 4


def write_huggingface(
    source: ModelSource,
    folder: str | Path,
    *,
    packed: bool,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model folder; it appears whole or not at all.

    Packed linears are stored as quarters of rows with a ``weight_scale`` in float32, which
    transformers casts. Masters are stored as they are. Packed linears whose floats are asked for
    become ``codes · scale / p``, p the share of codes that are not 0: absmean makes the same codes
    and scale of that again, up to the rounding of ``dtype``.

    Args:
        source: of the tensors.
        folder: where; an earlier folder of the same kind there is replaced.
        packed: whether to store linears as packed codes; the source must have them.
        dtype: of the stored floats, ``float32`` or ``bfloat16``; None for that of the source.
        shard_bytes: of the largest file; a tensor is never split.

    Raises:
        FabricError: transformers can't hold this model, the folder holds something else or can't be
            written, or a tensor can't be read.
    """
    folder, config = Path(folder), source.config
    form: BaseMode = "packed" if packed else "float" if source.form == "float" else "master"
    _require_writable(source, folder, form)
    stored = np.dtype(dtype or common_dtype(source))
    streams = dict(_streams(source, form, stored))
    earlier = {path.name for path in folder.iterdir()} if folder.is_dir() else set[str]()
    shards = frozenset(name for name in earlier if SHARD.fullmatch(name))
    with new_folder(folder, replaces=FILES | shards) as staged:
        tokens = special_tokens(copy_tokenizer(source.tokenizer_source, staged))
        settings = model_settings(config, form, dtype=stored.name, tokens=tokens)
        write_json(staged / CONFIG, settings)
        _write_shards(staged, streams, shard_bytes)


def is_huggingface_folder(folder: Path) -> bool:
    """Whether there is a model of transformers in a folder."""
    path = folder / CONFIG
    return path.is_file() and "model_type" in read_json_object(path)


def reciprocal(scale: float) -> np.float32:
    """The float32 number whose reciprocal in float32 is ``scale``, or the nearest where none is."""
    wanted, one = np.float32(scale), np.float32(1)
    guess = one / wanted
    near = (guess, np.nextafter(guess, np.float32(0)), np.nextafter(guess, np.float32(np.inf)))
    return min(near, key=lambda number: abs(float(one / number) - float(wanted)))


def masters_of(matrix: TernaryMatrix) -> HostArray:
    """Float32 weights [N, K] that absmean turns into the codes and the scale of ``matrix``."""
    codes = unpack_codes(matrix.packed, matrix.k)
    share = np.count_nonzero(codes) / codes.size
    return codes.astype(np.float32) * np.float32(matrix.scale / share if share else 0.0)


def _require_writable(source: ModelSource, folder: Path, form: BaseMode) -> None:
    config = source.config
    _ = family_of(config)
    if form == "packed" and source.form != "packed":
        raise FabricError(f"{source.origin} holds {source.form} weights", expected="packed ones")
    uneven = [path for path, (n, _) in config.linear_shapes.items() if n % CODES_PER_BYTE]
    if form == "packed" and uneven:
        raise FabricError(
            f"transformers packs four rows in one, which {config.name} does not allow",
            expected=f"numbers of rows divisible by {CODES_PER_BYTE}",
            found=", ".join(f"{path} with {config.linear_shapes[path][0]}" for path in uneven),
            fix="Write float weights instead",
        )
    if (folder / CONFIG).is_file() and not is_huggingface_folder(folder):
        raise FabricError(
            f"{folder} holds a model in another format",
            fix="Choose a new or empty folder",
        )


def _streams(
    source: ModelSource, form: BaseMode, dtype: np.dtype[Any]
) -> Iterator[tuple[str, TensorStream]]:
    """Every tensor of the folder by its name, in the order of the model."""
    config = source.config
    names = Names(config=config, body="model.", sub_norms=SUB_NORMS)
    table = (config.vocab_size, config.hidden_size)
    yield _tensor(source, names, "embedding", None, table, dtype)
    for layer in range(config.num_layers):
        for name, width in _gains(config, names).items():
            yield _tensor(source, names, name, layer, (width,), dtype)
        for path, shape in config.linear_shapes.items():
            yield from _linear(source, names, path, layer, shape, form, dtype)
    yield _tensor(source, names, "final_norm.gain", None, (config.hidden_size,), dtype)
    if not config.tied_head:
        assert names.head == HEAD
        yield _tensor(source, names, "head", None, table, dtype)


def _gains(config: ModelConfig, names: Names) -> dict[str, int]:
    """Widths of the norms of a layer, by their names in the base tree."""
    widths = {
        "attention.q_norm": config.head_dim,
        "attention.k_norm": config.head_dim,
        "attention.sub_norm": config.num_heads * config.head_dim,
        "mlp.sub_norm": config.ffn_size,
    }
    return {f"layers.{path}.gain": widths.get(path, config.hidden_size) for path in names.norms}


def _tensor(
    source: ModelSource,
    names: Names,
    name: str,
    layer: int | None,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
) -> tuple[str, TensorStream]:
    pieces = partial(tensor_pieces, source, name, layer, shape, dtype)
    stream = TensorStream(layout=Layout(shape=shape, dtype=dtype.name), pieces=pieces)
    return names.tensor(name, layer), stream


def _linear(
    source: ModelSource,
    names: Names,
    path: str,
    layer: int,
    shape: tuple[int, int],
    form: BaseMode,
    dtype: np.dtype[Any],
) -> Iterator[tuple[str, TensorStream]]:
    module = names.linear(path, layer)
    read = partial(source.linear, path, layer)
    if form != "packed":
        layout = Layout(shape=shape, dtype=dtype.name)
        pieces = partial(_floats, read, dtype)
        yield f"{module}.weight", TensorStream(layout=layout, pieces=pieces)
        return
    n, k = shape
    layout = Layout(shape=(n // CODES_PER_BYTE, k), dtype="uint8")
    yield f"{module}.weight", TensorStream(layout=layout, pieces=lambda: [_quarters(read())])
    multiplies = multiplies_scale(source.config)
    layout = Layout(shape=(1,), dtype="float32")
    yield (
        f"{module}.{SCALE}",
        TensorStream(layout=layout, pieces=lambda: [_scale(read(), multiplies)]),
    )


def _floats(read: "partial[TernaryMatrix | HostArray]", dtype: np.dtype[Any]) -> list[HostArray]:
    matrix = read()
    floats = masters_of(matrix) if isinstance(matrix, TernaryMatrix) else matrix
    return [floats.astype(dtype)]


def _quarters(matrix: TernaryMatrix | HostArray) -> HostArray:
    assert isinstance(matrix, TernaryMatrix)
    return to_quarter_rows(matrix.packed, matrix.k)


def _scale(matrix: TernaryMatrix | HostArray, multiplies: bool) -> HostArray:
    assert isinstance(matrix, TernaryMatrix)
    return np.asarray([matrix.scale if multiplies else reciprocal(matrix.scale)], np.float32)


def _write_shards(folder: Path, streams: dict[str, TensorStream], limit: int) -> None:
    """One file, or as many as the limit makes of it and an index."""
    shards = list(_shards(streams, limit))
    if len(shards) == 1:
        write_streams(folder / WEIGHTS, streams)
        return
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_streams(folder / file, {name: streams[name] for name in names})
        where |= dict.fromkeys(names, file)
    total = sum(stream.nbytes for stream in streams.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    write_json(folder / INDEX, index)


def _shards(streams: dict[str, TensorStream], limit: int) -> Iterable[list[str]]:
    names: list[str] = []
    size = 0
    for name, stream in streams.items():
        if names and size + stream.nbytes > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += stream.nbytes
    yield names
