"""Names of Hugging Face tensors and where they lie in the trees of fabric_jax; numpy only.

Used by every test that compares with transformers or PEFT, live or from golden files.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from fabric_kernels import pack_ternary2

from fabric_jax.models.config import ModelConfig

Arrays = Mapping[str, np.ndarray]

LINEARS = {
    ("attention", "q"): "self_attn.q_proj",
    ("attention", "k"): "self_attn.k_proj",
    ("attention", "v"): "self_attn.v_proj",
    ("attention", "o"): "self_attn.o_proj",
    ("mlp", "gate"): "mlp.gate_proj",
    ("mlp", "up"): "mlp.up_proj",
    ("mlp", "down"): "mlp.down_proj",
}
NORMS = {("attention_norm",): "input_layernorm", ("mlp_norm",): "post_attention_layernorm"}
POST_NORMS = {
    ("attention_norm",): "input_layernorm",
    ("attention_post_norm",): "post_attention_layernorm",
    ("mlp_norm",): "pre_feedforward_layernorm",
    ("mlp_post_norm",): "post_feedforward_layernorm",
}
QK_NORMS = {
    ("attention", "q_norm"): "self_attn.q_norm",
    ("attention", "k_norm"): "self_attn.k_norm",
}
SUB_NORMS = {
    ("attention", "sub_norm"): "self_attn.attn_sub_norm",
    ("mlp", "sub_norm"): "mlp.ffn_sub_norm",
}


def layer_names(config: ModelConfig) -> dict[tuple[str, ...], str]:
    """Path in ``layers`` of every float tensor of a layer, and its Hugging Face name."""
    norms = {
        **(POST_NORMS if config.post_norms else NORMS),
        **(QK_NORMS if config.qk_norm else {}),
        **(SUB_NORMS if config.sub_norms else {}),
    }
    return {
        **{(*path, "gain"): f"{name}.weight" for path, name in norms.items()},
        **{(*path, "weight"): f"{name}.weight" for path, name in LINEARS.items()},
    }


def top_names(config: ModelConfig) -> dict[tuple[str, ...], str]:
    """Path of every tensor outside the layers, and its Hugging Face name."""
    names: dict[tuple[str, ...], str] = {
        ("embedding",): "model.embed_tokens.weight",
        ("final_norm", "gain"): "model.norm.weight",
    }
    return names if config.tied_head else {**names, ("head",): "lm_head.weight"}


def put(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
    """Stores ``leaf`` in nested dictionaries."""
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf


def get(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """Reads a leaf of nested dictionaries."""
    for name in path:
        tree = tree[name]
    return tree


def to_base(state: Arrays, config: ModelConfig) -> dict[str, Any]:
    """The base tree of float or master weights."""
    tree: dict[str, Any] = {}
    for path, name in top_names(config).items():
        put(tree, path, jnp.asarray(state[name]))
    for path, name in layer_names(config).items():
        stack = [state[f"model.layers.{i}.{name}"] for i in range(config.num_layers)]
        put(tree, ("layers", *path), jnp.asarray(np.stack(stack)))
    return tree


def to_packed_base(state: Arrays, scales: Mapping[str, float], config: ModelConfig) -> Any:
    """The base tree of packed weights, from codes in the places of the linears' weights.

    ``scales`` has the factor that multiplies the codes, by the name of the module.
    """
    tree = to_base(state, config)
    for path, name in LINEARS.items():
        node = get(tree, ("layers", *path))
        node["weight"] = pack_ternary2(node["weight"].astype(jnp.int8))
        factors = [scales[f"model.layers.{i}.{name}"] for i in range(config.num_layers)]
        node["scale"] = jnp.asarray(factors, jnp.float32)
    return tree


def to_hf_names(tree: Mapping[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
    """A float base tree (weights or their gradients) by Hugging Face names."""
    named = {name: np.asarray(get(tree, path)) for path, name in top_names(config).items()}
    for path, name in layer_names(config).items():
        stack = np.asarray(get(tree, ("layers", *path)))
        named |= {f"model.layers.{i}.{name}": stack[i] for i in range(config.num_layers)}
    return named


def adapter_names(config: ModelConfig) -> dict[tuple[str, ...], str]:
    """Path in ``layers`` of A and B of every linear, and PEFT's name; B is transposed in ours."""
    return {
        (*path, "lora", part): f"{name}.lora_{part.upper()}.weight"
        for path, name in LINEARS.items()
        for part in ("a", "b")
    }


def to_adapter(state: Arrays, config: ModelConfig) -> dict[str, Any]:
    """The adapter tree, from PEFT's arrays named ``model.layers.<i>.<module>.lora_A.weight``."""
    tree: dict[str, Any] = {}
    for path, name in adapter_names(config).items():
        stack = [state[f"model.layers.{i}.{name}"] for i in range(config.num_layers)]
        turned = [array.T if path[-1] == "b" else array for array in stack]
        put(tree, ("layers", *path), jnp.asarray(np.stack(turned)))
    return tree


def to_peft_names(tree: Mapping[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
    """The inverse of :func:`to_adapter`, for gradients."""
    named: dict[str, np.ndarray] = {}
    for path, name in adapter_names(config).items():
        stack = np.asarray(get(tree, ("layers", *path)))
        for i in range(config.num_layers):
            named[f"model.layers.{i}.{name}"] = stack[i].T if path[-1] == "b" else stack[i]
    return named
