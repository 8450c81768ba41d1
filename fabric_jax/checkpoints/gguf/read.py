"""GGUF models, read tensor by tensor."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

import numpy as np

from fabric_jax.checkpoints.arrays import HostArray, summarize
from fabric_jax.checkpoints.gguf.floats import TERNARY, read_floats, read_ternary
from fabric_jax.checkpoints.gguf.metadata import (
    ACT_QUANT_KEY,
    TERNARY_KEY,
    Metadata,
    read_architecture,
    read_config,
)
from fabric_jax.checkpoints.gguf.names import (
    LINEARS,
    LLAMA,
    ROPE_FREQUENCIES,
    file_shapes,
    from_pairs,
    linear_name,
    tensor_name,
    turned_heads,
)
from fabric_jax.checkpoints.gguf.padding import NORM_AXES, Padding, read_padding
from fabric_jax.checkpoints.gguf.rounding import undo
from fabric_jax.checkpoints.source import ALL_ROWS, TernaryMatrix
from fabric_jax.errors import FabricError, unknown_name
from fabric_jax.gguf_container import GgufFile, read_gguf
from fabric_jax.layers.bit_linear import BaseMode
from fabric_jax.models.config import ModelConfig
from fabric_jax.quantization.absmax import ActQuant

ROUNDING, QUERY_SCALES = "fabric_jax.rounding.", "fabric_jax.query_scales"


@dataclass(frozen=True, kw_only=True)
class GgufModel:
    """A ``ModelSource``: the model in a GGUF file.

    Attributes:
        file: its header.
        architecture: llama.cpp's name.
        config: what the model is, padding undone.
        form: ``packed`` where a linear has a ternary type, else ``float``.
        act_quant: per token, unless the file names another.
        tokenizer_source: the file itself, "" if it has no vocabulary.
        origin: the path.
        padding: what the file has beyond the model.
    """

    file: GgufFile
    architecture: str
    config: ModelConfig
    form: BaseMode
    act_quant: ActQuant
    tokenizer_source: str
    origin: str
    padding: Padding | None

    def linear(self, path: str, layer: int) -> TernaryMatrix | HostArray:
        """See ``ModelSource``."""
        name = linear_name(path, layer)
        heads = turned_heads(self.architecture, path, self.config)
        if self.form != "packed":
            return from_pairs(read_floats(self.file, name), heads)
        matrix = read_ternary(self.file, name)
        scale = matrix.scale
        if self.padding is not None:
            matrix = self.padding.narrow_matrix(path, matrix)
            if path == "attention.q":
                scale = self._query_scale(layer, scale, self.padding)
        return TernaryMatrix(packed=from_pairs(matrix.packed, heads), scale=scale, k=matrix.k)

    def tensor(self, name: str, layer: int | None = None, *, rows: slice = ALL_ROWS) -> HostArray:
        """See ``ModelSource``."""
        stored = tensor_name(name, layer)
        if name in ("embedding", "head"):
            table = read_floats(self.file, stored, rows)
            return (
                table
                if self.padding is None
                else self.padding.narrow(table, ("vocabulary", "hidden"))
            )
        gain = read_floats(self.file, stored)
        if self.config.norm_offset:
            # llama.cpp multiplies by what is stored.
            gain = gain.astype(np.float32) - np.float32(self.config.norm_offset)
        elif self.padding is not None:
            axis = NORM_AXES[name]
            gain = self.padding.narrow(gain, (axis,))
            factor = self.padding.gain_factor(axis)
            gain = gain if factor == 1 else undo(gain, factor, self._missed(stored, gain))
        return gain[rows]

    def _missed(self, stored: str, gain: HostArray) -> HostArray | None:
        steps = self.file.metadata.get(ROUNDING + stored)
        if not isinstance(steps, list):
            return None
        if len(steps) != gain.size or not all(type(s) is int and abs(s) < 128 for s in steps):
            raise FabricError(f"{ROUNDING}{stored} in {self.origin} has not {gain.size} steps")
        return np.array(steps, np.int8)

    def _query_scale(self, layer: int, scale: float, padding: Padding) -> float:
        """The scale of q without the padding's factor; exact where the file has it."""
        plain = scale / padding.query_factor
        scales = self.file.metadata.get(QUERY_SCALES)
        if not isinstance(scales, list) or layer >= len(scales):
            return float(np.float32(plain))
        exact = scales[layer]
        if not isinstance(exact, float) or not np.isclose(exact, plain, rtol=1e-2):
            raise FabricError(
                f"{QUERY_SCALES} in {self.origin} contradicts the tensors",
                expected=f"about {plain:g} for layer {layer}",
                found=str(exact)[:40],
            )
        return exact


def open_gguf(path: str | Path) -> GgufModel:
    """Opens a model; only its header is read.

    The activation of ``bitnet`` is SiLU, as llama.cpp computes it; of ``bitnet-b1.58`` and
    ``bitnet-25``, which bitnet.cpp writes, squared ReLU. A key ``<arch>.hidden_activation`` decides
    where there is one, as in files that fabric_jax writes.

    Raises:
        FabricError: no GGUF model, one of another architecture, or one with tensors that are
            missing, unexpected or of the wrong shape; they are named.
    """
    path = Path(path)
    file = read_gguf(path)
    metadata = Metadata(path=str(path), values=file.metadata)
    if (kind := metadata.word("general.type", "model")) != "model":
        raise FabricError(
            f"{path} holds no model",
            found=f"general.type {kind}",
            fix="Give its base model here, and this file as the adapter",
        )
    architecture = read_architecture(metadata)
    types = _linear_types(file)
    ternary = bool(types & set(TERNARY)) or metadata.get(TERNARY_KEY, bool, False)
    config = read_config(file, name=path.stem, ternary=ternary)
    _require_tensors(file, config, architecture)
    padding = read_padding(file.metadata, config)
    if padding is not None and not ternary:
        raise FabricError(f"{path} claims padding, which only ternary models have")
    _require_rotation(metadata, architecture, config, padding)
    if "I2_S" in types:
        warnings.warn(
            f"{path} is read in the classic layout of I2_S. Files made by builds of bitnet.cpp "
            "since 2026 may have another, which can't be told from the bytes: check what the "
            "model writes, or use a TQ1_0 or TQ2_0 file.",
            stacklevel=2,
        )
    return GgufModel(
        file=file,
        architecture=architecture,
        config=config if padding is None else padding.config,
        form="packed" if ternary else "float",
        act_quant=_act_quant(metadata),
        tokenizer_source=str(path) if _has_vocabulary(metadata) else "",
        origin=str(path),
        padding=padding,
    )


def _linear_types(file: GgufFile) -> set[str]:
    """Names of the storage types of the layers' linears."""
    endings = tuple(f".{stem}.weight" for stem in LINEARS.values())
    return {tensor.type.name for name, tensor in file.tensors.items() if name.endswith(endings)}


def _require_tensors(file: GgufFile, config: ModelConfig, architecture: str) -> None:
    expected = file_shapes(config)
    found = {name: tensor.shape for name, tensor in file.tensors.items()}
    if architecture == LLAMA:
        found.pop(ROPE_FREQUENCIES, None)
    wrong = [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    wrong += [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name} is unexpected" for name in found if name not in expected]
    if wrong:
        raise FabricError(
            f"{file.path} does not hold the tensors of a {architecture} model: {summarize(wrong)}"
        )


def _require_rotation(
    metadata: Metadata, arch: str, config: ModelConfig, padding: Padding | None
) -> None:
    """Refuses heads of which the rotary positions turn a part, unless the rest is padding."""
    width = config.head_dim if padding is None else padding.config.head_dim
    turned = metadata.get(f"{arch}.rope.dimension_count", int, config.head_dim)
    value = metadata.get(f"{arch}.attention.value_length", int, config.head_dim)
    if turned != width or value != config.head_dim:
        raise FabricError(
            f"the attention of {metadata.path} is not supported",
            expected=f"{arch}.rope.dimension_count {width} and value_length {config.head_dim}",
            found=f"{turned} and {value}",
        )


def _act_quant(metadata: Metadata) -> ActQuant:
    named = metadata.word(ACT_QUANT_KEY, "per_token")
    if named not in get_args(ActQuant):
        raise unknown_name(f"{ACT_QUANT_KEY} in {metadata.path}", named, get_args(ActQuant))
    return cast(ActQuant, named)


def _has_vocabulary(metadata: Metadata) -> bool:
    model = metadata.values.get("tokenizer.ggml.model", "no_vocab")
    return "tokenizer.ggml.tokens" in metadata.values and model not in ("none", "no_vocab")
