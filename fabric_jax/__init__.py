"""LoRA fine-tuning of BitNet b1.58 (ternary) language models on packed 2-bit weights.

Names are imported when they are first used, so that ``import fabric_jax`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fabric_jax.data.config import DataConfig
    from fabric_jax.data.tokenizer import load_tokenizer
    from fabric_jax.errors import FabricError
    from fabric_jax.layers.lora import LoraConfig
    from fabric_jax.model import Model, load_model
    from fabric_jax.models.config import ModelConfig
    from fabric_jax.training.config import FinetuneConfig, OptimizerConfig
    from fabric_jax.training.loop import finetune

    __version__: str

_HOMES = {
    "DataConfig": "fabric_jax.data.config",
    "FabricError": "fabric_jax.errors",
    "FinetuneConfig": "fabric_jax.training.config",
    "LoraConfig": "fabric_jax.layers.lora",
    "Model": "fabric_jax.model",
    "ModelConfig": "fabric_jax.models.config",
    "OptimizerConfig": "fabric_jax.training.config",
    "finetune": "fabric_jax.training.loop",
    "load_model": "fabric_jax.model",
    "load_tokenizer": "fabric_jax.data.tokenizer",
}

__all__ = [
    "DataConfig",
    "FabricError",
    "FinetuneConfig",
    "LoraConfig",
    "Model",
    "ModelConfig",
    "OptimizerConfig",
    "__version__",
    "finetune",
    "load_model",
    "load_tokenizer",
]


def __getattr__(name: str) -> object:
    """Imports what a public name stands for (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        value: object = version("fabric-jax")
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
