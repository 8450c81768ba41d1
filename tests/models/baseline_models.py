"""Tiny models of the 16-bit families, and the same ones in transformers."""

from dataclasses import replace
from typing import Any

import numpy as np

from fabric_jax.layers.rope import RopeScaling
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.registry import get_config
from tests.models.hf_mapping import to_base

LENGTH = 24

QWEN3 = replace(
    get_config("qwen3-0.6b"),
    name="tiny-qwen3",
    vocab_size=97,
    num_layers=3,
    hidden_size=32,
    ffn_size=80,
    num_heads=4,
    num_kv_heads=2,
    # As in the released models wider than hidden_size / num_heads.
    head_dim=16,
    max_length=64,
)
# Every size of the family has attention_scale = head_dim ** -0.5; the largest released one has not.
GEMMA3 = replace(
    get_config("gemma-3-4b"),
    name="tiny-gemma3",
    vocab_size=97,
    num_layers=7,
    hidden_size=48,
    ffn_size=80,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_length=64,
    sliding_window=5,
    attention_scale=24**-0.5,
)
# With theta 1e4 and 16 channels: one frequency kept, two interpolated, the others divided.
LLAMA3 = ModelConfig(
    name="tiny-llama3",
    vocab_size=97,
    num_layers=3,
    hidden_size=64,
    ffn_size=80,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_length=512,
    sub_norms=False,
    tied_head=False,
    ternary=False,
    rope_scaling=RopeScaling(
        kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=64
    ),
)
CONFIGS = {"qwen3": QWEN3, "gemma3": GEMMA3, "llama3": LLAMA3}


def hf_config(config: ModelConfig) -> Any:
    """The configuration of the same model in transformers."""
    import transformers

    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "max_position_embeddings": config.max_length,
        "attn_implementation": "eager",
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    rope = _rope_parameters(config)
    if not config.post_norms:
        kind = transformers.Qwen3Config if config.qk_norm else transformers.LlamaConfig
        return kind(**values, hidden_act=config.activation, rope_parameters=rope)
    local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
    scale = config.attention_scale or config.head_dim**-0.5
    return transformers.Gemma3TextConfig(
        **values,
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=round(scale**-2),
        sliding_window=config.sliding_window,
        sliding_window_pattern=config.global_every,
        rope_parameters={"full_attention": rope, "sliding_attention": local},
    )


def _rope_parameters(config: ModelConfig) -> dict[str, Any]:
    scaling, theta = config.rope_scaling, {"rope_theta": config.rope_theta}
    if scaling is None:
        return {"rope_type": "default", **theta}
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor, **theta}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_length,
        **theta,
    }


def hf_model(config: ModelConfig, seed: int = 0) -> Any:
    """A model of transformers with random weights, float32, in eval mode."""
    import torch
    import transformers

    kind = hf_config(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_config(kind, dtype=torch.float32).eval()
        for parameter in model.parameters():
            gain = parameter.ndim == 1
            middle, spread = (1.0 - config.norm_offset, 0.3) if gain else (0.0, 0.25)
            parameter.copy_(torch.randn_like(parameter) * spread + middle)
    return model


def our_tree(config: ModelConfig, model: Any) -> dict[str, Any]:
    """The weights of ``model`` as our base tree."""
    return to_base({name: x.numpy() for name, x in model.state_dict().items()}, config)


def tokens_of(config: ModelConfig, rows: int = 2, length: int = LENGTH) -> np.ndarray:
    """Random tokens, int32 [rows, length]."""
    random = np.random.default_rng(0)
    return random.integers(1, config.vocab_size, (rows, length)).astype(np.int32)
