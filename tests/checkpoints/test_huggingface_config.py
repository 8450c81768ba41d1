"""What released ``config.json`` files say, against the registry and against transformers."""

import math
from dataclasses import replace
from typing import Any

import pytest

from fabric_jax.checkpoints.huggingface.config import describe
from fabric_jax.errors import FabricError
from fabric_jax.layers.rope import RopeScaling
from fabric_jax.models.registry import get_config

BITNET = {"quant_method": "bitnet", "modules_to_not_convert": None}


def config_json(
    model_type: str, sizes: tuple[int, ...], vocab: int, length: int, eps: float, **values: Any
) -> dict[str, Any]:
    """``sizes`` is (layers, width, feed-forward, heads, key/value heads)."""
    return {
        "model_type": model_type,
        "vocab_size": vocab,
        "num_hidden_layers": sizes[0],
        "hidden_size": sizes[1],
        "intermediate_size": sizes[2],
        "num_attention_heads": sizes[3],
        "num_key_value_heads": sizes[4],
        "max_position_embeddings": length,
        "rms_norm_eps": eps,
        "hidden_act": "silu",
        **values,
    }


TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False, "is_bitnet_config": True, "quantization_config": BITNET}
FALCON3 = {**UNTIED, "head_dim": 256, "rope_theta": 1000042}
# The keys that matter of the files that the owners published.
RELEASED: dict[str, dict[str, Any]] = {
    "bitnet-b1.58-large": config_json(
        "llama", (24, 1536, 4096, 16, 16), 32002, 2048, 1e-5, rope_theta=10000.0, **TIED
    ),
    "bitnet-b1.58-3b": config_json(
        "llama", (26, 3200, 8640, 32, 32), 32002, 2048, 1e-5, rope_scaling=None, **TIED
    ),
    "bitnet-2b-4t": config_json(
        "bitnet",
        (30, 2560, 6912, 20, 5),
        128256,
        4096,
        1e-5,
        rope_theta=500000.0,
        quantization_config={**BITNET, "linear_class": "autobitlinear"},
        **TIED,
    )
    | {"hidden_act": "relu2"},
    "llama3-8b-1.58": config_json(
        "llama", (32, 4096, 14336, 32, 8), 128256, 8192, 1e-5, rope_theta=500000.0, **UNTIED
    ),
    "falcon3-1b-1.58": config_json("llama", (18, 2048, 8192, 8, 4), 131072, 8192, 1e-6, **FALCON3),
    "falcon-e-1b": config_json(
        "llama", (24, 2048, 9216, 16, 2), 32768, 32768, 1e-5, rope_theta=1e6, **UNTIED
    ),
    "qwen3-0.6b": config_json(
        "qwen3",
        (28, 1024, 3072, 16, 8),
        151936,
        40960,
        1e-6,
        head_dim=128,
        rope_theta=1000000,
        sliding_window=None,
        use_sliding_window=False,
        max_window_layers=28,
        **TIED,
    ),
}
GEMMA_4B = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152},
}
GEMMA_1B = {
    "model_type": "gemma3_text",
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}


def described(config: dict[str, Any], **sniffed: bool):
    return describe(config, name="m", **{"sub_norms": False, "of_1bitllm": False, **sniffed})


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_are_those_of_the_registry(name: str) -> None:
    of_1bitllm = name in ("bitnet-b1.58-large", "bitnet-b1.58-3b")
    found = described(RELEASED[name], sub_norms=of_1bitllm, of_1bitllm=of_1bitllm)
    assert found.model == replace(get_config(name), name="m")


def test_gemma() -> None:
    assert described(GEMMA_1B).model == replace(get_config("gemma-3-1b"), name="m")
    found = described(GEMMA_4B).model
    assert found == replace(get_config("gemma-3-4b"), name="m", vocab_size=262208)
    whole = {**GEMMA_4B, "text_config": {**GEMMA_4B["text_config"], "query_pre_attn_scalar": 168}}
    assert described(whole).model.attention_scale == 168**-0.5


@pytest.mark.parametrize(
    ("quantization", "storage"),
    [
        ({}, "bitlinear"),
        ({"linear_class": "bitlinear"}, "bitlinear"),
        ({"linear_class": "bitlinear", "quantization_mode": "online"}, "bitlinear"),
        ({"linear_class": "autobitlinear"}, "autobitlinear"),
        ({"linear_class": "autobitlinear", "quantization_mode": "offline"}, "autobitlinear"),
        ({"linear_class": "autobitlinear", "quantization_mode": "online"}, "masters"),
        ({"modules_to_not_convert": ["lm_head"]}, "bitlinear"),
        ({"modules_to_not_convert": ["model.embed_tokens", "lm_head"]}, "bitlinear"),
    ],
)
def test_storage(quantization: dict[str, Any], storage: str) -> None:
    config = {**RELEASED["falcon-e-1b"], "quantization_config": {**BITNET, **quantization}}
    assert described(config).storage == storage


@pytest.mark.parametrize("spelling", ["new", "legacy"])
def test_llama3_scaling(spelling: str) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    rope: dict[str, Any] = {"rope_theta": 500000.0, "rope_scaling": scaling}
    if spelling == "new":
        rope = {"rope_parameters": {"rope_theta": 500000.0, **scaling}}
    plain = {k: v for k, v in RELEASED["llama3-8b-1.58"].items() if k != "rope_theta"}
    model = described({**plain, **rope}).model
    assert model.rope_theta == 500000.0
    assert model.rope_scaling == RopeScaling(
        kind="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_length=8192,
    )


LAYERS = ["sliding_attention"] * 5 + ["full_attention"]


@pytest.mark.parametrize(
    ("types", "every"),
    [
        ((LAYERS * 5)[:26], 6),
        (["sliding_attention"] * 26, 27),
        (["full_attention"] * 26, 1),
        (["sliding_attention", "full_attention"] * 13, 2),
    ],
)
def test_layer_types(types: list[str], every: int) -> None:
    model = described({**GEMMA_1B, "layer_types": types}).model
    assert model.global_every == every
    assert [model.is_global(layer) for layer in range(26)] == [t[0] == "f" for t in types]
    assert model.sliding_window == (None if every == 1 else 512)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("falcon-e-1b", {"model_type": "falcon"}, "unknown model_type.*'falcon'"),
        ("falcon-e-1b", {"hidden_size": None}, "lacks hidden_size"),
        ("falcon-e-1b", {"hidden_size": True}, "hidden_size is out of range"),
        ("falcon-e-1b", {"num_hidden_layers": 2.5}, "num_hidden_layers is out of range"),
        ("falcon-e-1b", {"num_hidden_layers": 10**40}, "num_hidden_layers is out of range"),
        ("falcon-e-1b", {"rms_norm_eps": math.nan}, "a value is out of range"),
        ("falcon-e-1b", {"rope_theta": math.inf}, "rope_theta is out of range"),
        ("falcon-e-1b", {"attention_bias": True}, "attention_bias to be off"),
        ("falcon-e-1b", {"mlp_bias": True}, "mlp_bias to be off"),
        ("falcon-e-1b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor to be off"),
        ("falcon-e-1b", {"hidden_act": "gelu"}, "unknown activation.*'gelu'"),
        ("falcon-e-1b", {"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_type.*'yarn'"),
        ("falcon-e-1b", {"rope_scaling": {"type": "linear"}}, "lacks factor"),
        ("falcon-e-1b", {"quantization_config": []}, "quantization_config is no object"),
        ("qwen3-0.6b", {"use_sliding_window": True}, "use_sliding_window to be off"),
        ("qwen3-0.6b", {"layer_types": ["full_attention"]}, "layer_types doesn't fit"),
    ],
)
def test_other_configurations_are_refused(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(FabricError, match=message):
        described({**RELEASED[name], **change})


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "gptq"}, "quantisation that is not supported.*gptq.*16-bit"),
        ({"quant_method": None}, "quantisation that is not supported"),
        ({"use_rms_norm": True}, "norms inside its linears"),
        ({"linear_class": "autobitlinaer"}, "Did you mean 'autobitlinear'"),
        ({"quantization_mode": "of"}, "unknown quantization_mode"),
        ({"modules_to_not_convert": []}, "quantised head"),
        ({"modules_to_not_convert": ["lm_head", "model.layers.3.mlp"]}, "leaves model.layers.3"),
        ({"modules_to_not_convert": ["lm_head", "up_proj"]}, "leaves model.layers.0.mlp.up_proj"),
        ({"modules_to_not_convert": ["lm_head", "(a+)+$"]}, "more than names of modules"),
        ({"modules_to_not_convert": "lm_head"}, "is no list"),
    ],
)
def test_other_quantisations_are_refused(quantization: dict[str, Any], message: str) -> None:
    config = {**RELEASED["falcon-e-1b"], "quantization_config": {**BITNET, **quantization}}
    with pytest.raises(FabricError, match=message):
        described(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping to be off"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention to be off"),
        ({"sliding_window": None}, "local layers but no sliding_window"),
        ({"layer_types": ["full_attention", *["sliding_attention"] * 25]}, "mixes its layers"),
        ({"layer_types": ["chunked_attention"] * 26}, "mixes its layers"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern is out of range"),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2}}}, "local"),
        ({"query_pre_attn_scalar": 0}, "out of range"),
    ],
)
def test_other_gemmas_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FabricError, match=message):
        described({**GEMMA_1B, **change})
