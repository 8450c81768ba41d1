"""What a model is, as GGUF's metadata tells it, and back."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast, get_args

import numpy as np

from fabric_jax.checkpoints.arrays import HostArray
from fabric_jax.checkpoints.gguf.names import (
    ARCHITECTURES,
    BITNET,
    BITNET_CPP,
    GEMMA3,
    LLAMA,
    QWEN3,
    ROPE_FREQUENCIES,
)
from fabric_jax.errors import FabricError, unknown_name
from fabric_jax.gguf_container import GgufFile, Value
from fabric_jax.layers.feed_forward import Activation
from fabric_jax.layers.rope import RopeScaling
from fabric_jax.models.config import ModelConfig

MAX_WORD = 200
T = TypeVar("T", int, float, str, bool)

OWN = "fabric_jax."
TERNARY_KEY, ACT_QUANT_KEY = OWN + "ternary", OWN + "act_quant"
GEMMA3_PERIOD, GEMMA3_LOCAL_THETA = 6, 10_000.0
"""What llama.cpp takes for arch ``gemma3`` whatever the file says."""
GEMMA3_27B_LAYERS = 62
"""The depth by which llama.cpp knows the one Gemma 3 whose scores are divided by sqrt(D / H)."""


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Typed access to the metadata of a file."""

    path: str
    values: Mapping[str, Value]

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The value of a key.

        Raises:
            FabricError: it is missing without a default, or of another type.
        """
        value = self.values.get(key, default)
        if value is None:
            raise FabricError(f"{self.path} lacks the metadata {key}")
        if kind is float and isinstance(value, float):
            # The shortest decimal that gives this float32: 1e-5, not 9.99999974e-06.
            return cast(T, float(str(np.float32(value))))
        if isinstance(value, list) and value and all(part == value[0] for part in value):
            # One for each layer; decoders here have the same in all of them.
            value = value[0]
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise FabricError(
                f"{key} in {self.path} has a value that it can't have",
                expected=kind.__name__,
                found=repr(value)[:60],
            )
        return cast(T, float(cast(float, value)) if kind is float else value)

    def word(self, key: str, default: str | None = None) -> str:
        """A short text that stands for one of a few things."""
        text = self.get(key, str, default)
        return text if len(text) <= MAX_WORD else f"{text[:MAX_WORD]}…"


def read_architecture(metadata: Metadata) -> str:
    """The architecture, if it is one that can be read."""
    architecture = metadata.word("general.architecture")
    if architecture not in ARCHITECTURES:
        raise unknown_name(f"architecture in {metadata.path}", architecture, ARCHITECTURES)
    return architecture


def read_config(file: GgufFile, *, name: str, ternary: bool) -> ModelConfig:
    """The model of a file, with the widths that the file has.

    Args:
        file: its header.
        name: of the model, where the file has none.
        ternary: whether its linears are.

    Raises:
        FabricError: metadata are missing or of a kind that no decoder here can compute.
    """
    metadata = Metadata(path=str(file.path), values=file.metadata)
    arch = read_architecture(metadata)
    _require_plain(metadata, arch)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise FabricError(f"{file.path} lacks token_embd.weight of two dimensions")
    layers = metadata.get(f"{arch}.block_count", int)
    if layers > len(file.tensors):
        raise FabricError(f"{file.path} claims {layers} layers, but has fewer tensors")
    width = metadata.get(f"{arch}.embedding_length", int)
    heads = metadata.get(f"{arch}.attention.head_count", int)
    if heads < 1:
        raise FabricError(f"{file.path} claims {heads} attention heads")
    head_dim = metadata.get(f"{arch}.attention.key_length", int, width // heads)
    config = ModelConfig(
        name=metadata.word("general.name", name),
        vocab_size=embedding.shape[0],
        num_layers=layers,
        hidden_size=width,
        ffn_size=metadata.get(f"{arch}.feed_forward_length", int),
        num_heads=heads,
        num_kv_heads=metadata.get(f"{arch}.attention.head_count_kv", int, heads),
        head_dim=head_dim,
        max_length=metadata.get(f"{arch}.context_length", int),
        rope_theta=metadata.get(f"{arch}.rope.freq_base", float, 10_000.0),
        norm_eps=metadata.get(f"{arch}.attention.layer_norm_rms_epsilon", float),
        activation=_activation(metadata, arch),
        sub_norms=arch in (BITNET, *BITNET_CPP),
        tied_head="output.weight" not in file.tensors or arch in (BITNET, *BITNET_CPP),
        ternary=ternary,
        qk_norm=arch in (QWEN3, GEMMA3),
        post_norms=arch == GEMMA3,
        norm_offset=1.0 if arch == GEMMA3 else 0.0,
        embedding_scale=arch == GEMMA3,
    )
    config = _with_locality(metadata, config) if arch == GEMMA3 else config
    return replace(config, rope_scaling=_rope_scaling(file, metadata, arch, config))


def config_fields(config: ModelConfig, architecture: str) -> dict[str, Any]:
    """The metadata of a model for :func:`read_config`; of a padded one, with the padded widths."""
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_length,
        "block_count": config.num_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.ffn_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.freq_base": float(config.rope_theta),
    }
    if architecture in (BITNET, *BITNET_CPP):
        fields["hidden_activation"] = config.activation
    if config.sliding_window is not None:
        fields["attention.sliding_window"] = config.sliding_window
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}
    own: dict[str, Any] = {TERNARY_KEY: config.ternary}
    if scaling is not None and scaling.kind == "llama3":
        parts = ("factor", "low_freq_factor", "high_freq_factor", "original_length")
        own |= {f"{OWN}rope_scaling.{part}": float(getattr(scaling, part)) for part in parts}
    return {f"{architecture}.{key}": value for key, value in fields.items()} | own


def rope_divisors(config: ModelConfig) -> HostArray | None:
    """The tensor ``rope_freqs`` [hd/2] of a model with Llama 3's scaling; None for others."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "llama3":
        return None
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = config.rope_theta**-exponents
    return (frequencies / scaling.apply(frequencies)).astype(np.float32)


def _require_plain(metadata: Metadata, arch: str) -> None:
    """Refuses what would change the computation and isn't supported."""
    for key in ("expert_count", "final_logit_softcapping", "attn_logit_softcapping"):
        value = metadata.values.get(f"{arch}.{key}")
        if value:
            raise FabricError(
                f"{metadata.path} has {arch}.{key} {str(value)[:40]}, which is not supported"
            )


def _activation(metadata: Metadata, arch: str) -> Activation:
    """llama.cpp's for the architecture, unless the file names it."""
    default = {GEMMA3: "gelu", LLAMA: "silu", QWEN3: "silu", BITNET: "silu"}.get(arch, "relu2")
    named = metadata.word(f"{arch}.hidden_activation", default)
    for activation in get_args(Activation):
        if named == activation:
            return activation
    raise unknown_name(f"{arch}.hidden_activation in {metadata.path}", named, get_args(Activation))


def _with_locality(metadata: Metadata, config: ModelConfig) -> ModelConfig:
    """Gemma 3's local layers, and the factor on its scores."""
    window = metadata.get("gemma3.attention.sliding_window", int, 0)
    if window:
        pattern = "gemma3.attention.sliding_window_pattern"
        config = replace(
            config,
            sliding_window=window,
            global_every=metadata.get(pattern, int, GEMMA3_PERIOD),
            local_rope_theta=metadata.get("gemma3.rope.freq_base_swa", float, GEMMA3_LOCAL_THETA),
        )
    return replace(config, attention_scale=gemma3_attention_scale(config))


def gemma3_attention_scale(config: ModelConfig) -> float | None:
    """What llama.cpp multiplies the scores of arch ``gemma3`` by; None for ``hd ** -0.5``."""
    if config.num_layers != GEMMA3_27B_LAYERS:
        return None
    return (config.hidden_size / config.num_heads) ** -0.5


def _rope_scaling(
    file: GgufFile, metadata: Metadata, arch: str, config: ModelConfig
) -> RopeScaling | None:
    if ROPE_FREQUENCIES in file.tensors:
        return _llama3_scaling(file, metadata, config)
    kind = metadata.word(f"{arch}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise FabricError(
            f"{file.path} lengthens its context in a way that is not supported",
            expected=f"{arch}.rope.scaling.type none or linear",
            found=kind,
        )
    factor = metadata.get(f"{arch}.rope.scaling.factor", float, 1.0)
    return None if kind == "none" or factor == 1 else RopeScaling(kind="linear", factor=factor)


def _llama3_scaling(file: GgufFile, metadata: Metadata, config: ModelConfig) -> RopeScaling:
    """The settings behind ``rope_freqs``: the file's own, or Llama 3.1's with the largest divisor.

    The tensor is what the runtime computes with, so settings that don't lead to it are refused.
    """
    from fabric_jax.checkpoints.gguf.floats import read_floats

    stored = read_floats(file, ROPE_FREQUENCIES)
    # Before anything is made for a head width that is only claimed so far.
    if stored.shape != (config.head_dim // 2,):
        raise FabricError(
            f"{ROPE_FREQUENCIES} in {file.path} has the wrong shape",
            expected=f"[{config.head_dim // 2}]",
            found=str(list(stored.shape)),
        )

    def setting(name: str, default: float) -> float:
        return metadata.get(f"{OWN}rope_scaling.{name}", float, default)

    largest = float(stored.max(initial=0))
    whole = float(round(largest))
    scaling = RopeScaling(
        kind="llama3",
        factor=setting("factor", whole if math.isclose(largest, whole, rel_tol=1e-4) else largest),
        low_freq_factor=setting("low_freq_factor", 1.0),
        high_freq_factor=setting("high_freq_factor", 4.0),
        original_length=int(setting("original_length", 8192.0)),
    )
    made = rope_divisors(replace(config, rope_scaling=scaling))
    if made is None or not np.allclose(made, stored, rtol=1e-4):
        raise FabricError(
            f"{ROPE_FREQUENCIES} in {file.path} is not of Llama 3.1's kind of rope scaling",
            expected="divisors between 1 and one factor, from 1 to 4 turns in 8192 tokens",
        )
    return scaling
