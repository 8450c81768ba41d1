"""Folders as the hub has them, written without transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.models.tiny_problems import Problem, Size, make_problem

TINY = Size(vocab=29, layers=2, hidden=16, ffn=24, heads=2, kv_heads=1, length=7)
QUANTIZATION: dict[str, dict[str, Any] | None] = {
    "online": {"linear_class": "autobitlinear", "quantization_mode": "online"},
    "offline": {"linear_class": "autobitlinear", "quantization_mode": "offline"},
    "bitlinear": {"modules_to_not_convert": None},
    "float": None,
}


def quarter_rows(codes: np.ndarray) -> np.ndarray:
    """The packing of transformers, one code after the other."""
    rows = -(-len(codes) // 4)
    packed = np.zeros((rows, codes.shape[1]), np.uint8)
    for row, values in enumerate(codes):
        packed[row % rows] |= (values.astype(np.int8) + 1).astype(np.uint8) << (2 * (row // rows))
    return packed


def config_of(problem: Problem) -> dict[str, Any]:
    """``config.json`` in the spelling of released models."""
    config = problem.config
    values: dict[str, Any] = {
        "architectures": ["BitNetForCausalLM" if config.sub_norms else "LlamaForCausalLM"],
        "model_type": "bitnet" if config.sub_norms else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": config.activation,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": config.max_length,
        "tie_word_embeddings": config.tied_head,
        "attention_bias": False,
    }
    quantization = QUANTIZATION[problem.storage]
    if quantization is not None:
        values["quantization_config"] = {"quant_method": "bitnet", **quantization}
    return values


def tensors_of(problem: Problem) -> dict[str, np.ndarray]:
    """The tensors by their names in files."""
    tensors = dict(problem.state)
    if problem.mode == "packed":
        for module, scale in problem.scales.items():
            tensors[f"{module}.weight"] = quarter_rows(tensors[f"{module}.weight"])
            stored = scale if problem.storage == "offline" else 1 / scale
            tensors[f"{module}.weight_scale"] = np.array([stored], np.float32)
    return tensors


def write(
    folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], *, shards: int = 1
) -> Path:
    """Writes a folder, in several shards with an index if ``shards`` is above 1."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    places: dict[str, str] = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        save_file(part, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_problem(folder: Path, name: str, *, shards: int = 1) -> Problem:
    """Writes a tiny problem and returns it."""
    problem = make_problem(name, TINY)
    write(folder, config_of(problem), tensors_of(problem), shards=shards)
    return problem
