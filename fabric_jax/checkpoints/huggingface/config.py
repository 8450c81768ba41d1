"""``config.json`` of transformers: what the model is and how its linears are stored.

Defaults are those of the configuration classes of transformers, since keys that have them may be
left out of a file.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from fabric_jax.checkpoints.huggingface.names import LINEARS
from fabric_jax.checkpoints.huggingface.rope import read_rope
from fabric_jax.errors import FabricError, unknown_name
from fabric_jax.layers.feed_forward import Activation
from fabric_jax.models.config import ModelConfig

Json = Mapping[str, Any]

Storage = Literal["bitlinear", "autobitlinear", "masters", "plain", "unsaid"]
"""Of the linears. ``bitlinear``: packed, and ``weight_scale`` divides the codes.
``autobitlinear``: packed, and ``weight_scale`` multiplies them. ``masters``: floats that every
forward pass quantises. ``plain``: floats that it does not. ``unsaid``: floats of a model that is
known to be ternary, in a checkpoint that doesn't say which of the two they are."""

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "relu2": "relu2",
    "gelu_pytorch_tanh": "gelu",
}
FAMILIES = ("bitnet", "llama", "qwen3", "gemma3_text")
DEFAULT_EPS = {"bitnet": 1e-5}
DEFAULT_LENGTH = {"qwen3": 32768, "gemma3_text": 131072}
# The released text_config of a multimodal Gemma names what differs from the class alone.
GEMMA3_DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
DIMENSIONS = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_size": "intermediate_size",
    "num_heads": "num_attention_heads",
}
# Switches of arithmetic that the decoder here does not have, and what each is when off.
REFUSED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
    "use_sliding_window": (None, False),
}


PLAIN_PATTERN = re.compile(r"[\w.-]{1,200}")
MAX_LAYERS = 1024


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a ``config.json`` says.

    Attributes:
        model: what the model is; ``ternary`` follows from ``storage``.
        storage: how its linears are stored.
    """

    model: ModelConfig
    storage: Storage


def describe(config: Json, *, name: str, sub_norms: bool, of_1bitllm: bool) -> Described:
    """Reads a ``config.json``.

    Args:
        config: its contents.
        name: for the model.
        sub_norms: whether the checkpoint has tensors of sub-norms, which decides: the
            configurations of 1bitLLM call themselves ``llama``.
        of_1bitllm: whether these have the names that 1bitLLM gives them.

    Raises:
        FabricError: the architecture, an option of it or the quantisation is not supported, or a
            value is missing or impossible.
    """
    text = _text_config(config)
    family = _family(text)
    if family == "gemma3_text":
        text = {**GEMMA3_DEFAULTS, **text}
    for key, off in REFUSED.items():
        if text.get(key) not in off:
            raise FabricError(
                f"config.json of {name} asks for what is not supported",
                expected=f"{key} to be off",
                found=repr(text[key])[:100],
            )
    quantization = config.get("quantization_config") or text.get("quantization_config")
    if quantization is not None:
        storage = _storage(quantization, name)
    elif of_1bitllm:
        storage = "masters"
    else:
        storage = "unsaid" if family == "bitnet" or config.get("is_bitnet_config") else "plain"
    model = _model(text, family, name, sub_norms=sub_norms, ternary=storage != "plain")
    if quantization is not None:
        _require_all_linears(cast(Json, quantization), model, name)
    return Described(model=model, storage=storage)


def _text_config(config: Json) -> Json:
    """The part about the text model; of multimodal checkpoints it is nested."""
    if config.get("model_type") != "gemma3":
        return config
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise FabricError("config.json of a multimodal model has no text_config")
    head = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
    return {"model_type": "gemma3_text", **head, **cast(dict[str, Any], text)}


def _family(text: Json) -> str:
    family = text.get("model_type")
    if family not in FAMILIES:
        raise unknown_name("model_type in config.json", str(family)[:100], (*FAMILIES, "gemma3"))
    return cast(str, family)


def _model(text: Json, family: str, name: str, *, sub_norms: bool, ternary: bool) -> ModelConfig:
    missing = [key for key in DIMENSIONS.values() if text.get(key) is None]
    if missing:
        raise FabricError(f"config.json of {name} lacks {', '.join(missing)}")
    dimensions = {field: _whole(text, key, name) for field, key in DIMENSIONS.items()}
    heads, gemma = dimensions["num_heads"], family == "gemma3_text"
    values: dict[str, Any] = {
        **dimensions,
        "num_kv_heads": heads,
        "head_dim": 128 if family == "qwen3" else dimensions["hidden_size"] // heads,
        "max_length": DEFAULT_LENGTH.get(family, 2048),
    }
    for field, key in (
        ("num_kv_heads", "num_key_value_heads"),
        ("head_dim", "head_dim"),
        ("max_length", "max_position_embeddings"),
    ):
        if text.get(key) is not None:
            values[field] = _whole(text, key, name)
    if gemma:
        values |= {"post_norms": True, "norm_offset": 1.0, "embedding_scale": True}
        values |= _attention_scale(text, values["head_dim"], name)
    return ModelConfig(
        **values,
        **read_rope(text, family, values["num_layers"], name),
        name=name,
        norm_eps=_number(text.get("rms_norm_eps", DEFAULT_EPS.get(family, 1e-6)), name),
        activation=_activation(text, name),
        sub_norms=sub_norms or family == "bitnet",
        tied_head=_flag(text, "tie_word_embeddings", name),
        ternary=ternary,
        qk_norm=gemma or family == "qwen3",
    )


def _attention_scale(text: Json, head_dim: int, name: str) -> dict[str, float]:
    width = _number(text["query_pre_attn_scalar"], name)
    return {} if width == head_dim else {"attention_scale": width**-0.5}


def _activation(text: Json, name: str) -> Activation:
    found = text.get("hidden_activation") or text.get("hidden_act") or "silu"
    if text.get("model_type") == "bitnet" and not text.get("hidden_act"):
        found = "relu2"
    if not isinstance(found, str) or found not in ACTIVATIONS:
        raise unknown_name(f"activation in config.json of {name}", str(found)[:100], ACTIVATIONS)
    return ACTIVATIONS[found]


def _storage(quantization: Any, name: str) -> Storage:
    """How linears are stored, from ``quantization_config``; never from magnitudes."""
    if not isinstance(quantization, dict):
        raise FabricError(f"config.json of {name}: quantization_config is no object")
    options = cast(dict[str, Any], quantization)
    if options.get("quant_method") != "bitnet":
        raise FabricError(
            f"{name} is stored in a quantisation that is not supported",
            expected='quant_method "bitnet", or none',
            found=str(options.get("quant_method"))[:100],
            fix="Take the model's 16-bit checkpoint, or a GGUF file of it",
        )
    if options.get("use_rms_norm"):
        raise FabricError(
            f"{name} has norms inside its linears (use_rms_norm), which are not supported"
        )
    kind = options.get("linear_class", "bitlinear")
    mode = options.get("quantization_mode", "offline")
    if kind not in ("bitlinear", "autobitlinear"):
        raise unknown_name("linear_class", str(kind)[:100], ("bitlinear", "autobitlinear"))
    if mode not in ("online", "offline"):
        raise unknown_name("quantization_mode", str(mode)[:100], ("online", "offline"))
    if kind == "bitlinear":  # Which has no modes.
        return "bitlinear"
    return "masters" if mode == "online" else "autobitlinear"


def _require_all_linears(quantization: Json, model: ModelConfig, name: str) -> None:
    """Refuses checkpoints that quantise the head, or only some linears of the layers."""
    listed = quantization.get("modules_to_not_convert")
    if listed is None:
        return
    if not isinstance(listed, list):
        raise FabricError(f"config.json of {name}: modules_to_not_convert is no list")
    patterns = [str(pattern) for pattern in cast(list[Any], listed)]
    strange = [pattern for pattern in patterns if not PLAIN_PATTERN.fullmatch(pattern)]
    if strange or len(patterns) > MAX_LAYERS:
        # They are regular expressions to transformers, of which some take for ever.
        raise FabricError(
            f"config.json of {name}: modules_to_not_convert has more than names of modules",
            found=str(strange)[:200],
        )
    if not _spared("lm_head", patterns):
        raise FabricError(
            f"{name} has a quantised head, which is not supported",
            expected="lm_head in modules_to_not_convert",
            found=str(patterns)[:200],
        )
    for layer in range(min(model.num_layers, MAX_LAYERS)):
        for part in LINEARS.values():
            module = f"model.layers.{layer}.{part}"
            if _spared(module, patterns):
                raise FabricError(
                    f"{name} leaves {module} as it is, and quantises others",
                    expected="all linears of the layers in one form",
                    found=f"modules_to_not_convert {patterns}"[:200],
                )


def _spared(module: str, patterns: list[str]) -> bool:
    """Whether transformers leaves a module alone: see ``should_convert_module`` there."""
    return any(
        module.endswith(pattern)
        or re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module) is not None
        for pattern in patterns
    )


def _whole(text: Json, key: str, name: str) -> int:
    value = text[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 40:
        raise FabricError(
            f"config.json of {name}: {key} is out of range",
            expected="a positive whole number",
            found=repr(value)[:100],
        )
    return value


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise FabricError(
            f"config.json of {name}: a value is out of range",
            expected="a positive number",
            found=repr(value)[:100],
        )
    return float(value)


def _flag(text: Json, key: str, name: str) -> bool:
    value = text.get(key)
    if not isinstance(value, bool | None):
        raise FabricError(
            f"config.json of {name}: {key} is out of range",
            expected="true or false",
            found=repr(value)[:100],
        )
    return bool(value)
