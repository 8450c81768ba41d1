"""Names and orders of llama.cpp: architectures, tensors, and the rows of queries and keys."""

import numpy as np

from fabric_jax.checkpoints.arrays import HostArray
from fabric_jax.models.config import ModelConfig

BITNET, LLAMA, QWEN3, GEMMA3 = "bitnet", "llama", "qwen3", "gemma3"
BITNET_CPP = ("bitnet-b1.58", "bitnet-25")
"""What bitnet.cpp calls microsoft's 2B-4T: the layout of ``bitnet`` with squared ReLU."""
ARCHITECTURES = (BITNET, *BITNET_CPP, LLAMA, QWEN3, GEMMA3)

TABLES = {
    "embedding": "token_embd.weight",
    "head": "output.weight",
    "final_norm.gain": "output_norm.weight",
}
NORMS = {
    "layers.attention_norm.gain": "attn_norm",
    "layers.attention.sub_norm.gain": "attn_sub_norm",
    "layers.attention.q_norm.gain": "attn_q_norm",
    "layers.attention.k_norm.gain": "attn_k_norm",
    "layers.attention_post_norm.gain": "post_attention_norm",
    "layers.mlp_norm.gain": "ffn_norm",
    "layers.mlp.sub_norm.gain": "ffn_sub_norm",
    "layers.mlp_post_norm.gain": "post_ffw_norm",
}
LINEARS = {
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.o": "attn_output",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}
ROPE_FREQUENCIES = "rope_freqs.weight"
"""Divisors of the rotary frequencies [hd/2], where a model has them (Llama 3.1)."""


def in_layer(stem: str, layer: int) -> str:
    """The tensor ``stem`` of a layer."""
    return f"blk.{layer}.{stem}.weight"


def linear_name(path: str, layer: int) -> str:
    """The tensor of a linear, ``path`` as in ``ModelConfig.linear_shapes``."""
    return in_layer(LINEARS[path], layer)


def tensor_name(name: str, layer: int | None) -> str:
    """The tensor that the base tree knows as ``name``."""
    return TABLES[name] if layer is None else in_layer(NORMS[name], layer)


def norm_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the gains of a layer, by their names in the base tree."""
    width, head = (config.hidden_size,), (config.head_dim,)
    shapes: dict[str, tuple[int, ...]] = {"layers.attention_norm.gain": width}
    if config.sub_norms:
        heads = (config.num_heads * config.head_dim,)
        shapes |= {"layers.attention.sub_norm.gain": heads}
        shapes |= {"layers.mlp.sub_norm.gain": (config.ffn_size,)}
    if config.qk_norm:
        shapes |= {"layers.attention.q_norm.gain": head, "layers.attention.k_norm.gain": head}
    if config.post_norms:
        shapes |= {"layers.attention_post_norm.gain": width, "layers.mlp_post_norm.gain": width}
    return shapes | {"layers.mlp_norm.gain": width}


def table_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors outside the layers, by their names in the base tree."""
    table = (config.vocab_size, config.hidden_size)
    head = {} if config.tied_head else {"head": table}
    return {"embedding": table, **head, "final_norm.gain": (config.hidden_size,)}


def file_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a file, by their names there."""
    shapes = {TABLES[name]: shape for name, shape in table_shapes(config).items()}
    for layer in range(config.num_layers):
        shapes |= {in_layer(NORMS[name], layer): s for name, s in norm_shapes(config).items()}
        shapes |= {linear_name(path, layer): s for path, s in config.linear_shapes.items()}
    return shapes


def turned_heads(architecture: str, path: str, config: ModelConfig) -> int:
    """Heads of a linear whose rows ``architecture`` stores in another order; 0 for none."""
    if architecture != LLAMA:
        return 0
    return {"attention.q": config.num_heads, "attention.k": config.num_kv_heads}.get(path, 0)


def to_pairs(rows: HostArray, heads: int) -> HostArray:
    """The order of arch ``llama``: of each head, row j and row hd/2 + j become neighbours.

    It turns neighbouring channels where everyone else turns halves.
    """
    if not heads:
        return rows
    return _swap(rows, heads, 2)


def from_pairs(rows: HostArray, heads: int) -> HostArray:
    """The inverse of :func:`to_pairs`."""
    if not heads:
        return rows
    return _swap(rows, heads, len(rows) // heads // 2)


def _swap(rows: HostArray, heads: int, outer: int) -> HostArray:
    parts = rows.reshape(heads, outer, -1, *rows.shape[1:])
    return np.ascontiguousarray(parts.swapaxes(1, 2)).reshape(rows.shape)
