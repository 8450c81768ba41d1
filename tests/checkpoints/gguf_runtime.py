"""The graphs of llama.cpp's archs ``bitnet`` and ``llama`` in float64, from a file alone.

Nothing of fabric_jax is used: the gguf package reads the files, the rest is numpy. Activations are
not quantised.
"""

from pathlib import Path

import gguf
import numpy as np


def read(path: Path) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        t.name: gguf.quants.dequantize(np.asarray(t.data), t.tensor_type).astype(np.float64)
        for t in reader.tensors
    }
    return fields, tensors


def runtime_logits(path: Path, tokens: np.ndarray, adapter: Path | None = None) -> np.ndarray:
    """Logits [T, V] of one row of tokens, with the adapter's share where there is one."""
    fields, tensors = read(path)
    arch = str(fields["general.architecture"])
    key = {name.removeprefix(f"{arch}."): value for name, value in fields.items()}
    eps = float(key["attention.layer_norm_rms_epsilon"])
    heads, kv_heads = int(key["attention.head_count"]), int(key["attention.head_count_kv"])
    head_dim, turned = int(key["attention.key_length"]), int(key["rope.dimension_count"])
    lora_fields, lora = read(adapter) if adapter is not None else ({}, {})
    alpha = float(lora_fields.get("adapter.lora.alpha", 0.0))

    def product(name: str, x: np.ndarray) -> np.ndarray:
        y = x @ tensors[f"{name}.weight"].T
        if f"{name}.weight.lora_a" in lora:
            a, b = (lora[f"{name}.weight.lora_{letter}"] for letter in "ab")
            assert a.shape[0] == b.shape[1]
            y = y + (alpha / b.shape[1] if alpha else 1.0) * (x @ a.T) @ b.T
        return y

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        scale = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
        return x * scale * tensors[f"{name}.weight"]

    angles = np.arange(len(tokens))[:, None] * float(key["rope.freq_base"]) ** (
        -np.arange(0, turned, 2) / turned
    )
    if arch == "bitnet":
        first, second = np.arange(turned // 2), np.arange(turned // 2) + turned // 2
    else:
        first, second = np.arange(0, turned, 2), np.arange(1, turned, 2)

    def turn(x: np.ndarray) -> np.ndarray:
        out, cos, sin = x.copy(), np.cos(angles)[:, None], np.sin(angles)[:, None]
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., second] * cos + x[..., first] * sin
        return out

    def attention(layer: str, x: np.ndarray) -> np.ndarray:
        q, k, v = (
            product(f"{layer}.attn_{letter}", x).reshape(len(x), -1, head_dim) for letter in "qkv"
        )
        q, k = turn(q), turn(k)
        k, v = (np.repeat(part, heads // kv_heads, axis=1) for part in (k, v))
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(head_dim)
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("hts,shd->thd", weights, v).reshape(len(x), -1)

    h = tensors["token_embd.weight"][tokens]
    for number in range(int(key["block_count"])):
        layer = f"blk.{number}"
        x = attention(layer, norm(f"{layer}.attn_norm", h))
        if arch == "bitnet":
            x = norm(f"{layer}.attn_sub_norm", x)
        h = h + product(f"{layer}.attn_output", x)
        x = norm(f"{layer}.ffn_norm", h)
        gate = product(f"{layer}.ffn_gate", x)
        x = gate / (1 + np.exp(-gate)) * product(f"{layer}.ffn_up", x)
        if arch == "bitnet":
            x = norm(f"{layer}.ffn_sub_norm", x)
        h = h + product(f"{layer}.ffn_down", x)
    head = tensors["token_embd.weight" if arch == "bitnet" else "output.weight"]
    return norm("output_norm", h) @ head.T
