"""Greedy text of tiny random models equals transformers' ``generate``."""

import dataclasses
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fabric_jax.generation.config import GenerationConfig
from fabric_jax.generation.generator import make_generator
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.initialize import initialize_adapter
from tests.models import baseline_models as tiny

PROMPTS = [[5, 17, 3, 60], [9, 1, 2, 3, 4, 5, 6, 7, 8], [42]]
NEW = 20
LLAMA = ModelConfig(
    name="tiny-llama",
    vocab_size=101,
    num_layers=2,
    hidden_size=32,
    ffn_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_length=64,
    sub_norms=False,
    tied_head=False,
    ternary=False,
)
BITNET = dataclasses.replace(
    LLAMA, name="tiny-bitnet", sub_norms=True, tied_head=True, activation="relu2"
)
LINEARS = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
SUB_NORMS = {"attention.sub_norm": "self_attn.attn_sub_norm", "mlp.sub_norm": "mlp.ffn_sub_norm"}


def hugging_face_model(config: ModelConfig, torch, transformers):
    settings = {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": config.activation,
        "tie_word_embeddings": config.tied_head,
        "attn_implementation": "eager",
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    family = "BitNet" if config.sub_norms else "Llama"
    make = getattr(transformers, f"{family}ForCausalLM")
    model = make(getattr(transformers, f"{family}Config")(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1))
    return model


def our_tree(config: ModelConfig, model) -> dict:
    weights = {name: jnp.asarray(x.numpy()) for name, x in model.state_dict().items()}
    tree: dict = {
        "embedding": weights["model.embed_tokens.weight"],
        "final_norm": {"gain": weights["model.norm.weight"]},
    }
    if not config.tied_head:
        tree["head"] = weights["lm_head.weight"]
    norms = NORMS | (SUB_NORMS if config.sub_norms else {})
    for ours, theirs in (LINEARS | norms).items():
        node = tree.setdefault("layers", {})
        for part in ours.split("."):
            node = node.setdefault(part, {})
        node["weight" if ours in LINEARS else "gain"] = jnp.stack(
            [weights[f"model.layers.{i}.{theirs}.weight"] for i in range(config.num_layers)]
        )
    return tree


def as_adapter(config: ModelConfig, merged, torch) -> tuple[LoraConfig, dict]:
    """A random adapter of rank 2 on every linear, which is also added to those of ``merged``."""
    lora = LoraConfig(rank=2, alpha=4.0)
    definition = define_decoder(config, DecoderOptions(mode="float", lora=lora))
    noise = np.random.default_rng(1)
    tree = jax.tree.map(
        lambda x: jnp.asarray(noise.normal(0, 0.2, x.shape), x.dtype),
        initialize_adapter(definition, 0),
    )
    with torch.no_grad():
        for ours, theirs in LINEARS.items():
            node = tree["layers"]
            for part in ours.split("."):
                node = node[part]
            change = lora.scale * np.einsum("lrn,lrk->lnk", node["lora"]["b"], node["lora"]["a"])
            for i, one in enumerate(change):
                merged.get_submodule(f"model.layers.{i}.{theirs}").weight += torch.tensor(one)
    return lora, tree


FAMILIES = {"llama": LLAMA, "bitnet": BITNET, **tiny.CONFIGS}
QUICK = [("llama", False), ("qwen3", False), ("gemma3", False), ("bitnet", True)]
CASES = [
    pytest.param(name, adapted, marks=() if (name, adapted) in QUICK else pytest.mark.slow)
    for name in FAMILIES
    for adapted in (False, True)
]


@pytest.mark.oracle
@pytest.mark.parametrize(("name", "adapted"), CASES)
def test_greedy_equals_transformers(oracle, name, adapted):
    """With a cache here; there with one (the base) and without (merged with the adapter)."""
    torch, transformers = oracle("torch", "transformers")
    config = FAMILIES[name]
    if name in tiny.CONFIGS:
        model = tiny.hf_model(config)
        base = tiny.our_tree(config, model)
    else:
        model = hugging_face_model(config, torch, transformers)
        base = our_tree(config, model)
    lora, adapter = as_adapter(config, model, torch) if adapted else (LoraConfig(rank=0), {})
    definition = define_decoder(config, DecoderOptions(mode="float", lora=lora))
    generate = make_generator(definition)
    settings = GenerationConfig(max_new_tokens=NEW)
    ours = generate(base, adapter, PROMPTS, settings)
    for prompt, result in zip(PROMPTS, ours, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=None,
            use_cache=not adapted,
        )
        assert list(result.tokens) == theirs[0, len(prompt) :].tolist()
    assert len(np.unique([result.tokens for result in ours])) > 5
    if name != "bitnet":
        return
    alone = generate(base, adapter, PROMPTS, replace(settings, batch_size=1))
    assert alone == ours
