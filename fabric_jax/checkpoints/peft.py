"""LoRA adapters in the layout of Hugging Face's PEFT.

``adapter_config.json`` and ``adapter_model.safetensors``; layer i's A [R, K] and B [N, R] are named
``base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight`` and so on, after the modules of
transformers' decoders. Here layers are stacked, and B is kept as [R, N].
"""

import re
from collections.abc import Iterator
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
from fabric_jax.checkpoints.folders import new_folder, read_json_object
from fabric_jax.checkpoints.tensor_file import open_tensors, write_tensors
from fabric_jax.errors import FabricError
from fabric_jax.files import write_json
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderDefinition
from fabric_jax.models.initialize import Tree, nest

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = frozenset({CONFIG, WEIGHTS, "README.md"})
"""What an adapter folder holds; PEFT adds the README."""

MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
LINEARS = {module.rpartition(".")[2]: name for name, module in MODULES.items()}
MATRICES = {"a": "lora_A", "b": "lora_B"}

UNSUPPORTED = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "layers_to_transform",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
"""What makes an adapter something else than ``scale · B(A(x))`` on whole linears; plain LoRA sets
none of it."""

CHANGES_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")
"""Initialisations that subtract from the base: the adapter does not fit the original weights."""


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
        write_json(staged / CONFIG, _to_peft(lora, base_name))


def read_lora_config(folder: str | Path) -> LoraConfig:
    """The LoRA settings of an adapter folder; its targets are those that it has tensors for.

    Raises:
        FabricError: the folder is no adapter, or one of a kind that can't be represented.
    """
    folder = Path(folder)
    config = _read_config(folder)
    path = folder / CONFIG
    stored = open_tensors(folder / WEIGHTS).layouts
    modules = {_module(name) for name in stored}
    dtypes = {layout.dtype for layout in stored.values()}
    unknown = sorted(modules - LINEARS.keys())
    if unknown or not modules:
        raise FabricError(
            f"the adapter {folder} targets modules that can't have one here",
            expected=f"some of {', '.join(LINEARS)}",
            found=", ".join(unknown) or "no tensor",
        )
    targets = config["target_modules"]
    if isinstance(targets, list):
        listed = {str(target).rpartition(".")[2] for target in cast(list[Any], targets)}
        if listed != modules:
            raise FabricError(
                f"{path} and {WEIGHTS} disagree about the targets",
                expected=", ".join(sorted(listed)),
                found=", ".join(sorted(modules)),
            )
    order = list(LINEARS.values())
    narrow: Literal["float32", "bfloat16"] = "bfloat16" if dtypes == {"bfloat16"} else "float32"
    try:
        return LoraConfig(
            rank=config["r"],
            alpha=float(config["lora_alpha"]),
            targets=tuple(sorted((LINEARS[module] for module in modules), key=order.index)),
            dropout=float(config.get("lora_dropout") or 0.0),
            rslora=bool(config.get("use_rslora")),
            adapter_dtype=narrow,
        )
    except (TypeError, ValueError) as error:
        raise FabricError(f"{path} has a value of the wrong type: {error}") from error


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
    stored, lora = read_lora_config(folder), definition.options.lora
    if (stored.rank, stored.scale) != (lora.rank, lora.scale):
        raise FabricError(
            f"the adapter {folder} has other LoRA settings than the model was defined with",
            expected=f"rank {lora.rank} and scale {lora.scale:g}",
            found=f"rank {stored.rank} and scale {stored.scale:g}",
        )
    declared = _adapter_layouts(definition)
    names = list(_tensor_names(definition))
    file = open_tensors(folder / WEIGHTS)
    expected = {peft: _file_layout(name, declared[name]) for name, _, peft in names}
    found = {peft: _as_float32(layout) for peft, layout in file.layouts.items()}
    if wrong := layout_differences(expected, found):
        base = _read_config(folder).get("base_model_name_or_path") or "an unnamed model"
        raise FabricError(
            f"the adapter {folder}, trained on {base}, does not fit "
            f"{describe_model(definition.config)}: {summarize(wrong)}",
            fix="Load the model that it was trained on",
        )
    stacks: dict[str, list[HostArray]] = {name: [] for name in declared}
    for name, _, peft in names:
        stacks[name].append(_turn(name, file.read(peft)))
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
            module = f"base_model.model.model.layers.{layer}.{MODULES[linear]}"
            yield name, layer, f"{module}.{MATRICES[matrix]}.weight"


def _adapter_layouts(definition: DecoderDefinition) -> dict[str, Layout]:
    return layouts(nnx.to_pure_dict(definition.adapter))


def _file_layout(name: str, stack: Layout) -> Layout:
    """Of one layer of a stack, as PEFT turns it; files may hold any float, read as float32."""
    shape = stack.shape[:0:-1] if name.endswith(".b") else stack.shape[1:]
    return Layout(shape=shape, dtype="float32")


def _turn(name: str, matrix: HostArray) -> HostArray:
    """From a matrix here to PEFT's, and back: B is transposed."""
    return matrix.T if name.endswith(".b") else matrix


def _as_float32(layout: Layout) -> Layout:
    floating = layout.dtype in ("float16", "bfloat16")
    return replace(layout, dtype="float32") if floating else layout


def _stack(parts: list[HostArray], dtype: str) -> jax.Array:
    stack = np.stack([part.astype(np.float32) for part in parts])
    return jax.device_put(stack, may_alias=False).astype(dtype)


def _module(name: str) -> str:
    """The module that a tensor of an adapter belongs to; the name itself if it is no A or B."""
    match = re.fullmatch(r".*\.(\w+)\.lora_[AB]\.weight", name)
    return match[1] if match else name


def _to_peft(lora: LoraConfig, base_name: str) -> dict[str, Any]:
    """The settings under PEFT's names."""
    names = [module.rpartition(".")[2] for name, module in MODULES.items() if lora.covers(name)]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": names,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def _read_config(folder: Path) -> dict[str, Any]:
    """PEFT's settings, refused where they mean more than LoRA on whole linears."""
    if not folder.is_dir():
        raise FabricError(f"the adapter folder {folder} does not exist")
    path = folder / CONFIG
    config = read_json_object(path)
    if config.get("peft_type") != "LORA":
        raise FabricError(
            f"{path} is not of a LoRA adapter",
            expected="peft_type LORA",
            found=str(config.get("peft_type")),
        )
    missing = [key for key in ("r", "lora_alpha", "target_modules") if key not in config]
    if missing:
        raise FabricError(f"{path} lacks {', '.join(missing)}")
    if not isinstance(config["r"], int):
        raise FabricError(f"{path} has a rank that is no whole number", found=repr(config["r"]))
    used = [key for key in UNSUPPORTED if config.get(key)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if str(config.get("init_lora_weights")).startswith(CHANGES_BASE):
        used.append("init_lora_weights")
    if used:
        raise FabricError(
            f"the adapter {folder} is more than plain LoRA",
            found=", ".join(f"{key} = {config[key]!r}" for key in used),
            fix="Train it without these settings",
        )
    return config
