"""Which of llama.cpp's architectures computes a model, or why none does.

The choice: sub-norms go to ``bitnet``, norms of queries and keys to ``qwen3`` or ``gemma3``, what
has neither to ``llama``. Squared ReLU is written under ``bitnet`` too, with a warning: llama.cpp
has no other architecture for it and computes SiLU there. bitnet.cpp does compute it, under
``bitnet-b1.58``, which can be asked for.
"""

import warnings
from collections.abc import Mapping

from fabric_jax.checkpoints.gguf.metadata import (
    GEMMA3_LOCAL_THETA,
    GEMMA3_PERIOD,
    gemma3_attention_scale,
)
from fabric_jax.checkpoints.gguf.names import BITNET, BITNET_CPP, GEMMA3, LLAMA, QWEN3
from fabric_jax.errors import FabricError, unknown_name
from fabric_jax.models.config import ModelConfig

RELU2_TRAP = (
    "computes squared ReLU, but llama.cpp hard-codes SiLU for arch bitnet: an unpatched runtime "
    "gives other, wrong logits for this file. Use a runtime patched to LLM_FFN_RELU_SQR, or write "
    "arch bitnet-b1.58 for bitnet.cpp."
)


def choose_architecture(config: ModelConfig, wanted: str | None = None) -> str:
    """The architecture to write a model under.

    Args:
        config: what the model is.
        wanted: ``bitnet-b1.58`` or ``bitnet-25`` for bitnet.cpp; None for llama.cpp's.

    Raises:
        FabricError: no architecture computes this model, or not the wanted one.
    """
    if wanted is None:
        if config.sub_norms:
            wanted = BITNET
        elif config.qk_norm:
            wanted = GEMMA3 if config.post_norms else QWEN3
        else:
            wanted = LLAMA
    elif wanted not in (BITNET, *BITNET_CPP, LLAMA, QWEN3, GEMMA3):
        raise unknown_name("architecture", wanted, (BITNET, *BITNET_CPP, LLAMA, QWEN3, GEMMA3))
    wrong = [
        f"{name} {getattr(config, name)!r} instead of {value!r}"
        for name, value in _requirements(config, wanted).items()
        if getattr(config, name) not in (value if isinstance(value, tuple) else (value,))
    ]
    if wrong:
        raise FabricError(
            f"{config.name} can't be written to GGUF: arch {wanted} computes something else "
            f"than a model with {', '.join(wrong)}"
        )
    return wanted


def warn_of_activation(config: ModelConfig, architecture: str) -> None:
    """Says plainly that stock runtimes get squared ReLU wrong."""
    if architecture == BITNET and config.activation == "relu2":
        warnings.warn(f"{config.name} {RELU2_TRAP}", stacklevel=3)


def _requirements(config: ModelConfig, architecture: str) -> Mapping[str, object]:
    """Values that the architecture implies; tuples are alternatives."""
    plain: dict[str, object] = {
        "activation": "silu",
        "sub_norms": False,
        "qk_norm": False,
        "post_norms": False,
        "norm_offset": 0.0,
        "embedding_scale": False,
        "attention_scale": (None, config.head_dim**-0.5),
        "sliding_window": None,
    }
    if architecture == QWEN3:
        return plain | {"qk_norm": True}
    if architecture == GEMMA3:
        scale = gemma3_attention_scale(config)
        local = {
            "global_every": GEMMA3_PERIOD,
            "local_rope_theta": GEMMA3_LOCAL_THETA,
            "sliding_window": config.sliding_window,
        }
        return {
            "activation": "gelu",
            "sub_norms": False,
            "qk_norm": True,
            "post_norms": True,
            "norm_offset": 1.0,
            "embedding_scale": True,
            "attention_scale": (None, config.head_dim**-0.5) if scale is None else scale,
        } | (local if config.sliding_window is not None else {})
    if architecture == LLAMA:
        return plain
    activations = ("silu", "relu2") if architecture == BITNET else "relu2"
    return plain | {"sub_norms": True, "tied_head": True, "activation": activations}
