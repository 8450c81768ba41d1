"""LoRA adapters in the layout of Hugging Face's PEFT.

``adapter_config.json`` and ``adapter_model.safetensors``; layer i's A [R, K] and B [N, R] are named
``base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight`` and so on, after the modules of
transformers' decoders. Here layers are stacked, and B is kept as [R, N].

PEFT can give each module a rank and an alpha of its own; here they belong to a linear, in all
layers. Where the layers of a file differ, each is filled with zeros up to the largest rank of its
linear and its B multiplied by the ratio of the scales: B(A(x)) stays what it was, and the zeros,
whose gradients are zero too, stay zeros in training.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import jax
import numpy as np
from flax import nnx

from fabric_jax.checkpoints.arrays import (
    HostArray,
    Layout,
    layout_differences,
    layouts,
    named_leaves,
    summarize,
)
from fabric_jax.checkpoints.folders import new_folder
from fabric_jax.checkpoints.peft_config import (
    CONFIG,
    LINEARS,
    MODULES,
    Share,
    read_settings,
    share_of,
    to_lora_config,
    to_settings,
)
from fabric_jax.checkpoints.tensor_file import open_tensors, write_tensors
from fabric_jax.errors import FabricError
from fabric_jax.files import write_json
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderDefinition
from fabric_jax.models.initialize import Tree, nest

WEIGHTS = "adapter_model.safetensors"
FILES = frozenset({CONFIG, WEIGHTS, "README.md"})
"""What an adapter folder holds; PEFT adds the README."""

MATRICES = {"a": "lora_A", "b": "lora_B"}
ROOT = "base_model.model."
"""PEFT's wrappers around the base model, in the names of tensors."""


def save_adapter(
    folder: str | Path, definition: DecoderDefinition, adapter: Tree, base_name: str
) -> None:
    """Writes an adapter folder that PEFT loads; it appears whole or not at all.

    Args:
        folder: where; an earlier adapter folder there is replaced.
        definition: of the decoder that the adapter belongs to.
        adapter: its weights.
        base_name: the base model's name or folder, which PEFT loads when only given the adapter.

    Raises:
        FabricError: ``adapter`` does not fit ``definition``, has values that are not finite, or the
            folder can't be written.
    """
    lora = definition.options.lora
    wrong = layout_differences(_adapter_layouts(definition), layouts(adapter))
    if wrong or lora.rank == 0:
        raise FabricError(
            f"these weights are no adapter of {describe_model(definition.config)}: "
            + (summarize(wrong) or "it has rank 0")
        )
    leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(adapter).items()}
    tensors = {
        peft_name: _turn(name, leaves[name][layer])
        for name, layer, peft_name in _tensor_names(definition)
    }
    with new_folder(folder, replaces=FILES) as staged:
        write_tensors(staged / WEIGHTS, tensors)
        write_json(staged / CONFIG, to_settings(lora, base_name))


def read_lora_config(folder: str | Path) -> LoraConfig:
    """The LoRA settings of an adapter folder; its targets are those that it has tensors for.

    Raises:
        FabricError: the folder is no adapter, or one of a kind that can't be represented.
    """
    return _read(Path(folder))[0]


def differing_layers(folder: str | Path) -> list[str]:
    """The linears whose layers have different ranks or scales in an adapter folder."""
    _, shares = _read(Path(folder))
    by_linear = _by_linear(shares)
    return [name for name, found in by_linear.items() if len(set(found)) > 1]


def load_adapter(folder: str | Path, definition: DecoderDefinition) -> Tree:
    """Loads an adapter folder for a decoder; weights are cast to the decoder's adapter dtype.

    Args:
        folder: written by ``save_adapter`` or by PEFT.
        definition: made with the settings that ``read_lora_config`` returned.

    Raises:
        FabricError: the adapter is of another model or other settings (tensors and dimensions are
            named), is damaged, or has values that are not finite.
    """
    folder = Path(folder)
    stored, shares = _read(folder)
    lora = definition.options.lora
    require_settings(folder, stored, lora)
    declared = _adapter_layouts(definition)
    names = list(_tensor_names(definition))
    file = open_tensors(folder / WEIGHTS)
    ranks = {module: share.rank for module, share in shares.items()}
    expected = {
        peft: _file_layout(name, declared[name], ranks.get(_module_path(peft)))
        for name, _, peft in names
    }
    found = {peft: _as_float32(layout) for peft, layout in file.layouts.items()}
    if wrong := layout_differences(expected, found):
        base = read_settings(folder).get("base_model_name_or_path") or "an unnamed model"
        raise FabricError(
            f"the adapter {folder}, trained on {base}, does not fit "
            f"{describe_model(definition.config)}: {summarize(wrong)}",
            fix="Load the model that it was trained on",
        )
    stacks: dict[str, list[HostArray]] = {name: [] for name in declared}
    for name, _, peft in names:
        target = lora.of(name.split(".")[2])
        share = shares[_module_path(peft)]
        stacks[name].append(_widened(name, file.read(peft), share, target))
    leaves = [
        (tuple(name.split(".")), _stack(parts, declared[name].dtype))
        for name, parts in stacks.items()
    ]
    return nest(leaves)


def describe_model(config: ModelConfig) -> str:
    """The dimensions that decide whether an adapter fits, for messages."""
    return (
        f"{config.name} (L {config.num_layers}, D {config.hidden_size}, F {config.ffn_size}, "
        f"heads {config.num_heads}/{config.num_kv_heads} of {config.head_dim})"
    )


def _tensor_names(definition: DecoderDefinition) -> Iterator[tuple[str, int, str]]:
    """(dotted name, layer, PEFT's name) of each matrix of each layer."""
    for name in _adapter_layouts(definition):
        # layers.attention.q.lora.a
        linear, _, matrix = name.split(".")[2:]
        for layer in range(definition.config.num_layers):
            module = f"{ROOT}model.layers.{layer}.{MODULES[linear]}"
            yield name, layer, f"{module}.{MATRICES[matrix]}.weight"


def _adapter_layouts(definition: DecoderDefinition) -> dict[str, Layout]:
    return layouts(nnx.to_pure_dict(definition.adapter))


def _file_layout(name: str, stack: Layout, rank: int | None) -> Layout:
    """Of one layer of a stack, as PEFT turns it; files may hold any float, read as float32."""
    own, wide = rank or stack.shape[1], stack.shape[2]
    shape = (wide, own) if name.endswith(".b") else (own, wide)
    return Layout(shape=shape, dtype="float32")


def _widened(name: str, matrix: HostArray, share: Share, target: LoraConfig) -> HostArray:
    """One layer's A [R, K] or B [R, N] in float32, at the rank and for the scale of its linear."""
    turned = _turn(name, matrix).astype(np.float32)
    if name.endswith(".b") and share.scale != target.scale:
        turned = turned * np.float32(share.scale / target.scale)
    return np.pad(turned, ((0, target.rank - share.rank), (0, 0)))


def _turn(name: str, matrix: HostArray) -> HostArray:
    """From a matrix here to PEFT's, and back: B is transposed."""
    return matrix.T if name.endswith(".b") else matrix


def _as_float32(layout: Layout) -> Layout:
    floating = layout.dtype in ("float16", "bfloat16")
    return replace(layout, dtype="float32") if floating else layout


def _stack(parts: list[HostArray], dtype: str) -> jax.Array:
    return jax.device_put(np.stack(parts), may_alias=False).astype(dtype)


def _read(folder: Path) -> tuple[LoraConfig, dict[str, Share]]:
    """The settings of a folder, and what each module has, by its path within the base model."""
    settings = read_settings(folder)
    stored = open_tensors(folder / WEIGHTS).layouts
    paths = list(dict.fromkeys(map(_module_path, stored)))
    found = {path.rpartition(".")[2] for path in paths}
    unknown = sorted(found - LINEARS.keys())
    if unknown or not found:
        raise FabricError(
            f"the adapter {folder} targets modules that can't have one here",
            expected=f"some of {', '.join(LINEARS)}",
            found=", ".join(unknown) or "no tensor",
        )
    _require_targets(folder, settings["target_modules"], found)
    narrow: Literal["float32", "bfloat16"] = (
        "bfloat16" if {layout.dtype for layout in stored.values()} == {"bfloat16"} else "float32"
    )
    try:
        shares = {path: share_of(settings, path) for path in paths}
        return to_lora_config(settings, _by_linear(shares), narrow), shares
    except (TypeError, ValueError) as error:
        raise FabricError(f"{folder / CONFIG} has a value of the wrong type: {error}") from error


def _by_linear(shares: Mapping[str, Share]) -> dict[str, list[Share]]:
    """What the layers of each linear have, both in order."""
    grouped: dict[str, list[Share]] = {name: [] for name in MODULES}
    for path, share in sorted(shares.items()):
        grouped[LINEARS[path.rpartition(".")[2]]].append(share)
    return {name: found for name, found in grouped.items() if found}


def _require_targets(folder: Path, targets: Any, found: set[str]) -> None:
    """Refuses a list of targets that is not the list of modules with tensors."""
    if not isinstance(targets, list):
        return
    listed = {str(target).rpartition(".")[2] for target in cast(list[Any], targets)}
    if listed != found:
        raise FabricError(
            f"{folder / CONFIG} and {WEIGHTS} disagree about the targets",
            expected=", ".join(sorted(listed)),
            found=", ".join(sorted(found)),
        )


def require_settings(source: str | Path, stored: LoraConfig, lora: LoraConfig) -> None:
    """Refuses a decoder that was defined with other ranks or scales than the file has."""
    for name in sorted(stored.linears):
        has, wanted = stored.of(name), lora.of(name)
        if (has.rank, has.scale) != (wanted.rank, wanted.scale):
            raise FabricError(
                f"the adapter {source} has other LoRA settings than the model was defined with",
                expected=f"rank {wanted.rank} and scale {wanted.scale:g} for {name}",
                found=f"rank {has.rank} and scale {has.scale:g}",
            )


def _module_path(name: str) -> str:
    """The module within the base model that A or B belongs to; other names are kept."""
    match = re.fullmatch(r"(.*\.\w+)\.lora_[AB]\.weight", name)
    return match[1].removeprefix(ROOT) if match else name
