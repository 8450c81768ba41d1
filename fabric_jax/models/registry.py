"""Names of models and their configurations."""

from fabric_jax.errors import unknown_name
from fabric_jax.models import bitnet, gemma3, llama, qwen3
from fabric_jax.models.config import ModelConfig

REGISTRY: dict[str, ModelConfig] = {
    config.name: config
    for config in (*bitnet.CONFIGS, *llama.CONFIGS, *qwen3.CONFIGS, *gemma3.CONFIGS)
}


def get_config(name: str) -> ModelConfig:
    """The configuration registered under ``name``.

    Raises:
        FabricError: no such name; the closest one is offered.
    """
    if name not in REGISTRY:
        raise unknown_name("model", name, REGISTRY)
    return REGISTRY[name]
