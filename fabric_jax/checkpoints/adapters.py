"""From what a user names to an adapter: a folder in PEFT's layout or a ``.gguf`` file."""

from pathlib import Path

import jax
from flax import nnx

from fabric_jax.checkpoints import peft
from fabric_jax.checkpoints.arrays import layout_differences, layouts, summarize
from fabric_jax.checkpoints.loading import open_source
from fabric_jax.errors import FabricError
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderDefinition
from fabric_jax.models.initialize import Tree
from fabric_jax.models.registry import REGISTRY


def read_lora_config(path: str | Path, model: str | Path | ModelConfig) -> LoraConfig:
    """The LoRA settings of an adapter.

    Args:
        path: a folder in PEFT's layout or a ``.gguf`` file.
        model: the one that it belongs to, as ``load_base`` takes it, or what is known of it. Only
            GGUF adapters need it, whose rows are in an order that depends on it.

    Raises:
        FabricError: there is no adapter, it is of a kind that can't be represented, or the model
            can't be read or is another one.
    """
    if not _is_gguf(path):
        return peft.read_lora_config(path)
    from fabric_jax.checkpoints.gguf.adapter import read_gguf_adapter

    config = model if isinstance(model, ModelConfig) else model_config(model)
    return read_gguf_adapter(_existing(path), config)[0]


def load_adapter(path: str | Path, definition: DecoderDefinition) -> Tree:
    """Loads an adapter for a decoder; weights are cast to the decoder's adapter dtype.

    Args:
        path: a folder in PEFT's layout or a ``.gguf`` file.
        definition: made with the settings that ``read_lora_config`` returned.

    Raises:
        FabricError: the adapter is of another model or other settings, or is damaged.
    """
    if not _is_gguf(path):
        return peft.load_adapter(path, definition)
    from fabric_jax.checkpoints.gguf.adapter import read_gguf_adapter

    lora, tree = read_gguf_adapter(_existing(path), definition.config)
    peft.require_settings(path, lora, definition.options.lora)
    declared = nnx.to_pure_dict(definition.adapter)
    dtype = definition.options.lora.adapter_dtype
    cast: Tree = jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
    if wrong := layout_differences(layouts(declared), layouts(cast)):
        raise FabricError(
            f"the adapter {path} has other targets than the model was defined with: "
            + summarize(wrong)
        )
    return cast


def notes_on(path: str | Path) -> list[str]:
    """What the user should know of how an adapter was read."""
    if _is_gguf(path) or not (differing := peft.differing_layers(path)):
        return []
    return [
        f"the layers of {path} differ in rank or scale ({', '.join(differing)}): the smaller were "
        "filled with zeros to the rank of the largest and their scales moved into B, which changes "
        "no output; the zeros stay zeros in training"
    ]


def model_config(model: str | Path) -> ModelConfig:
    """What a model is, without reading its weights.

    Raises:
        FabricError: there is no such model.
    """
    name = str(model)
    if name in REGISTRY:
        return REGISTRY[name]
    return open_source(name).config


def _is_gguf(path: str | Path) -> bool:
    return Path(path).suffix == ".gguf"


def _existing(path: str | Path) -> Path:
    found = Path(path).expanduser()
    if not found.is_file():
        raise FabricError(f"the adapter {path} does not exist")
    return found
