"""Tiny models, and GGUF files of them as llama.cpp's own converter would write them.

Names come from the gguf package's tensor map, bytes from its quantisers, fields from its writer.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
from fabric_kernels import unpack_ternary2

from fabric_jax.checkpoints.assemble import assemble_base, base_layouts
from fabric_jax.checkpoints.source import ModelSource
from fabric_jax.layers.rope import RopeScaling
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.initialize import nest
from fabric_jax.models.registry import get_config
from tests.checkpoints.tree_source import TreeSource
from tests.models.hf_mapping import LINEARS, layer_names, top_names
from tests.models.running import whole_rows

BITNET = replace(
    get_config("bitnet-125m"),
    name="tiny-bitnet",
    num_layers=2,
    hidden_size=256,
    ffn_size=512,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=61,
    max_length=64,
    rope_theta=500_000.0,
)
LLAMA = replace(BITNET, name="tiny-llama", sub_norms=False, tied_head=False, norm_eps=1e-6)
QWEN3 = replace(
    get_config("qwen3-0.6b"),
    name="tiny-qwen3",
    vocab_size=61,
    num_layers=2,
    hidden_size=32,
    ffn_size=80,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_length=64,
)
GEMMA3 = replace(
    get_config("gemma-3-4b"),
    name="tiny-gemma3",
    vocab_size=61,
    num_layers=6,
    hidden_size=32,
    ffn_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_length=64,
    sliding_window=5,
)
LLAMA3 = replace(
    LLAMA,
    name="tiny-llama3",
    ternary=False,
    hidden_size=64,
    ffn_size=96,
    head_dim=16,
    rope_theta=10_000.0,
    rope_scaling=RopeScaling(
        kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192
    ),
)
PLAIN = {"qwen3": QWEN3, "gemma3": GEMMA3, "llama3": LLAMA3}
TERNARY = {
    "bitnet": BITNET,
    "relu2": replace(BITNET, name="tiny-relu2", activation="relu2"),
    "llama": LLAMA,
    "padded": replace(BITNET, name="tiny-padded", hidden_size=200, head_dim=50, ffn_size=500),
    "padded-llama": replace(
        LLAMA, name="tiny-padded-llama", hidden_size=180, head_dim=50, ffn_size=300
    ),
}
PROBE = np.random.default_rng(5).integers(0, 61, (2, 12)).astype(np.int32)

ARCHITECTURES = {
    "bitnet": gguf.MODEL_ARCH.BITNET,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
}


def random_tree(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Base weights that float16 holds: scales, tables, and plain linears; gains are float32."""
    mode = "packed" if config.ternary else "float"
    layouts = base_layouts(define_decoder(config, DecoderOptions(mode=mode)))
    random = np.random.default_rng(seed)
    widths = {f"layers.{path}.weight": shape[1] for path, shape in config.linear_shapes.items()}

    def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name in widths and mode == "packed":
            codes = random.integers(0, 3, (*shape, 4)).astype(np.uint8)
            codes.reshape(*shape[:-1], -1)[..., widths[name] :] = 1
            return (codes << np.array([0, 2, 4, 6], np.uint8)).sum(-1, dtype=np.uint8)
        if name.endswith("scale"):
            return random.uniform(0.02, 0.2, shape).astype(np.float16).astype(np.float32)
        if name.endswith("gain"):
            gains = 1 - config.norm_offset + 0.3 * random.standard_normal(shape)
            # Of so few bits that one can be added to them and taken away.
            return np.round(gains * 4096).astype(np.float32) / 4096
        std = 1.0 if name in ("embedding", "head") else 0.25
        return (std * random.standard_normal(shape)).astype(np.float16).astype(np.float32)

    return nest([(tuple(n.split(".")), fill(n, layout.shape)) for n, layout in layouts.items()])


def tree_source(config: ModelConfig, seed: int = 0, **changes: Any) -> TreeSource:
    form = "packed" if config.ternary else "float"
    return TreeSource(config=config, form=form, tree=random_tree(config, seed), **changes)


def logits(source: ModelSource, tokens: np.ndarray = PROBE, **options: Any) -> np.ndarray:
    """Of the decoder over the assembled base, float32 [B, T, V]."""
    definition = define_decoder(source.config, DecoderOptions(mode=source.form, **options))
    base = assemble_base(definition, source)

    def run(base: dict[str, Any]) -> jax.Array:
        decoder = definition.bind(base, {})
        return decoder.logits(decoder(*whole_rows(tokens)))

    return np.asarray(jax.jit(run)(base))


def dense_state(source: TreeSource) -> dict[str, np.ndarray]:
    """All weights as float32 under Hugging Face's names."""
    config = source.config
    state = {name: source.tensor(".".join(path)) for path, name in top_names(config).items()}
    linears = {(*path, "weight") for path in LINEARS}
    for path, name in layer_names(config).items():
        for layer in range(config.num_layers):
            full = f"model.layers.{layer}.{name}"
            if path not in linears:
                state[full] = source.tensor(".".join(("layers", *path)), layer)
                continue
            matrix = source.linear(".".join(path[:-1]), layer)
            if source.form == "packed":
                codes = np.asarray(unpack_ternary2(matrix.packed, matrix.k))
                matrix = codes * np.float32(matrix.scale)
            state[full] = matrix
    return state


def llama_cpp_permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """``LlamaModel.permute`` of convert_hf_to_gguf.py."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def llama_cpp_tensors(source: TreeSource, arch: str) -> dict[str, np.ndarray]:
    """Float32 tensors as convert_hf_to_gguf.py names and orders them."""
    config = source.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[arch], config.num_layers)
    # The package knows the sub-norms by 1bitLLM's names alone.
    spellings = {"attn_sub_norm": "inner_attn_ln", "ffn_sub_norm": "ffn_layernorm"}
    tensors: dict[str, np.ndarray] = {}
    for name, value in dense_state(source).items():
        if arch == "llama" and name.endswith("q_proj.weight"):
            value = llama_cpp_permute(value, config.num_heads)
        if arch == "llama" and name.endswith("k_proj.weight"):
            value = llama_cpp_permute(value, config.num_kv_heads)
        if arch == "gemma3" and value.ndim == 1:
            value = value + 1
        for ours, theirs in spellings.items():
            name = name.replace(ours, theirs)
        stored = names.get_name(name, try_suffixes=(".weight",))
        assert stored is not None, name
        tensors[stored] = value
    return tensors


def write_llama_cpp(
    path: Path,
    source: TreeSource,
    arch: str,
    linears: gguf.GGMLQuantizationType,
    *,
    others: dict[str, gguf.GGMLQuantizationType] | None = None,
    stored_arch: str | None = None,
    change: Any = None,
) -> Path:
    """A file with linears of one type, tables in F16 and gains in F32.

    ``others`` has types of single tensors; ``change`` edits the tensors before they are written.
    """
    config = source.config
    writer = gguf.GGUFWriter(path, stored_arch or arch)
    writer.add_type("model")
    writer.add_name(config.name)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.ffn_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("no_vocab")
    if config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)
    if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
    if arch == "bitnet":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(1.0)
    tensors = llama_cpp_tensors(source, arch)
    if change is not None:
        change(tensors)
    kinds = gguf.GGMLQuantizationType
    for name, value in tensors.items():
        if name.startswith("blk.") and value.ndim == 2:
            kind = linears
        else:
            kind = kinds.F16 if value.ndim == 2 else kinds.F32
        kind = (others or {}).get(name, kind)
        writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
