"""From ``ModelConfig`` to the ``config.json`` of transformers."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from fabric_jax.errors import FabricError
from fabric_jax.layers.bit_linear import BaseMode
from fabric_jax.layers.feed_forward import Activation
from fabric_jax.layers.rope import RopeScaling
from fabric_jax.models.config import ModelConfig

ModelType = Literal["bitnet", "llama", "qwen3", "gemma3_text"]

ACTIVATIONS: dict[Activation, str] = {
    "silu": "silu",
    "relu2": "relu2",
    "gelu": "gelu_pytorch_tanh",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture of transformers, by what its code always does."""

    model_type: ModelType
    architecture: str
    sub_norms: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    embedding_scale: bool = False


FAMILIES = (
    Family(model_type="bitnet", architecture="BitNetForCausalLM", sub_norms=True),
    Family(model_type="llama", architecture="LlamaForCausalLM"),
    Family(model_type="qwen3", architecture="Qwen3ForCausalLM", qk_norm=True),
    Family(
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        qk_norm=True,
        post_norms=True,
        norm_offset=1.0,
        embedding_scale=True,
    ),
)
STRUCTURE = ("sub_norms", "qk_norm", "post_norms", "norm_offset", "embedding_scale")


def family_of(config: ModelConfig) -> Family:
    """The architecture that computes this model.

    Raises:
        FabricError: transformers has none.
    """
    found = {name: getattr(config, name) for name in STRUCTURE}
    for family in FAMILIES:
        if all(getattr(family, name) == value for name, value in found.items()):
            _require_attention(config, family)
            return family
    raise FabricError(
        f"transformers has no architecture for {config.name}",
        expected=f"the structure of one of {', '.join(f.model_type for f in FAMILIES)}",
        found=", ".join(f"{name} {value}" for name, value in found.items()),
    )


def model_settings(
    config: ModelConfig, form: BaseMode, *, dtype: str, tokens: dict[str, Any]
) -> dict[str, Any]:
    """``config.json`` of a model.

    Args:
        config: of the model.
        form: of the stored linears: ``packed``, ``master`` (quantised as they are used), ``float``.
        dtype: of the stored floats.
        tokens: ids of special tokens under the names of transformers.

    Raises:
        FabricError: transformers has no architecture for it.
    """
    family = family_of(config)
    activation = ACTIVATIONS[config.activation]
    settings: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": activation,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_length,
        "tie_word_embeddings": config.tied_head,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "torch_dtype": dtype,
        **_rope(config),
        **tokens,
    }
    if family.model_type == "gemma3_text":
        settings |= _gemma(config, activation)
    if form != "float":
        settings["quantization_config"] = quantization(config, form)
    return settings


def quantization(config: ModelConfig, form: BaseMode) -> dict[str, Any]:
    """``quantization_config``: in which of its three ways transformers computes ternary linears."""
    if form == "master":
        linear, mode = "autobitlinear", "online"
    else:
        linear, mode = ("autobitlinear" if multiplies_scale(config) else "bitlinear"), "offline"
    return {
        "quant_method": "bitnet",
        "linear_class": linear,
        "quantization_mode": mode,
        "modules_to_not_convert": ["lm_head"],
    }


def multiplies_scale(config: ModelConfig) -> bool:
    """Whether ``weight_scale`` multiplies, as in microsoft's models, or divides, as in others'."""
    return config.sub_norms


def _require_attention(config: ModelConfig, family: Family) -> None:
    """Refuses kinds of attention that the family's code has no setting for."""
    if family.model_type == "gemma3_text":
        _ = _pre_attention_scalar(config)
        return
    width = config.num_heads * config.head_dim
    if family.model_type == "bitnet" and width != config.hidden_size:
        raise FabricError(
            f"the architecture bitnet of transformers does not compute {config.name}: its "
            "sub-norms are as wide as the model",
            expected=f"heads that are {config.hidden_size} wide together",
            found=f"{config.num_heads} heads of {config.head_dim}",
        )
    wrong = [name for name in ("sliding_window", "local_rope_theta") if getattr(config, name)]
    if config.attention_scale not in (None, config.head_dim**-0.5):
        wrong.append("attention_scale")
    if wrong:
        raise FabricError(
            f"the architecture {family.model_type} of transformers does not compute {config.name}",
            found=", ".join(f"{name} {getattr(config, name)}" for name in wrong),
        )


def _rope(config: ModelConfig) -> dict[str, Any]:
    """Rotary positions, under the names of transformers 5 and of the versions before."""
    scaling = _scaling(config.rope_scaling)
    parameters = {"rope_theta": config.rope_theta, **scaling}
    settings: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_parameters": parameters}
    if config.rope_scaling is not None:
        settings["rope_scaling"] = scaling
    return settings


def _scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "default"}
    settings: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        settings |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    return settings


def _gemma(config: ModelConfig, activation: str) -> dict[str, Any]:
    """What only Gemma 3 has a name for."""
    local = config.rope_theta if config.local_rope_theta is None else config.local_rope_theta
    kinds = ("sliding_attention", "full_attention")
    rope = _rope(config)["rope_parameters"]
    return {
        "hidden_activation": activation,
        "query_pre_attn_scalar": _pre_attention_scalar(config),
        "sliding_window": config.sliding_window,
        "sliding_window_pattern": config.global_every,
        "layer_types": [kinds[config.is_global(i)] for i in range(config.num_layers)],
        "rope_local_base_freq": local,
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }


def _pre_attention_scalar(config: ModelConfig) -> int:
    """The whole number whose inverse root is the factor on scores."""
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    scalar = round(scale**-2)
    if not math.isclose(scalar**-0.5, scale, rel_tol=1e-12):
        raise FabricError(
            f"the architecture gemma3_text of transformers does not compute {config.name}",
            expected="an attention_scale that is 1 / sqrt of a whole number",
            found=str(scale),
        )
    return scalar
