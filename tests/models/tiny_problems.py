"""Tiny models with reproducible weights, for comparison with transformers; numpy only.

Random numbers are sums of integers from a bit stream that numpy keeps as it is for ever, so that
golden files need to hold results alone.
"""

import zlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fabric_jax.layers.feed_forward import Activation
from fabric_jax.models.config import ModelConfig
from tests.models.hf_mapping import LINEARS, layer_names, to_base, to_packed_base, top_names

Storage = Literal["online", "offline", "bitlinear", "float"]
"""How transformers stores the linears: masters quantised in each forward pass, unpacked codes times
a scale, packed codes divided by a scale, or plain weights."""

ALPHA, RANK = 6.0, 3


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A model, its weights by Hugging Face names, and tokens to run it on."""

    config: ModelConfig
    storage: Storage
    state: dict[str, np.ndarray]
    scales: dict[str, float]
    adapter: dict[str, np.ndarray]
    tokens: np.ndarray

    @property
    def mode(self) -> Literal["packed", "master", "float"]:
        """Our name for the form of the weights."""
        if self.storage == "online":
            return "master"
        return "float" if self.storage == "float" else "packed"

    def base(self) -> dict[str, Any]:
        """Our base tree."""
        if self.mode == "packed":
            return to_packed_base(self.state, self.scales, self.config)
        return to_base(self.state, self.config)


@dataclass(frozen=True, kw_only=True)
class Size:
    """Dimensions of a tiny model."""

    vocab: int = 99
    layers: int = 3
    hidden: int = 64
    ffn: int = 96
    heads: int = 4
    kv_heads: int = 2
    length: int = 17


LIVE = Size()
GOLDEN = Size(vocab=37, layers=2, hidden=16, ffn=24, heads=2, kv_heads=1, length=9)
PROBLEMS: dict[str, tuple[Storage, Activation]] = {
    "bitnet-relu2-online": ("online", "relu2"),
    "bitnet-silu-online": ("online", "silu"),
    "bitnet-relu2-offline": ("offline", "relu2"),
    "bitnet-silu-offline": ("offline", "silu"),
    "llama-bitlinear": ("bitlinear", "silu"),
    "llama-float": ("float", "silu"),
}


def make_problem(name: str, size: Size, seed: int = 0) -> Problem:
    """The problem ``name`` at a size."""
    storage, activation = PROBLEMS[name]
    bitnet = name.startswith("bitnet")
    config = ModelConfig(
        name=name,
        vocab_size=size.vocab,
        num_layers=size.layers,
        hidden_size=size.hidden,
        ffn_size=size.ffn,
        num_heads=size.heads,
        num_kv_heads=size.kv_heads,
        head_dim=size.hidden // size.heads,
        max_length=64,
        rope_theta=10_000.0 if activation == "silu" else 500_000.0,
        activation=activation,
        sub_norms=bitnet,
        tied_head=bitnet,
        ternary=storage != "float",
    )
    # Legacy on purpose: numpy may change what a Generator yields, never what a RandomState does.
    random = np.random.RandomState(seed)
    state, scales = _weights(config, storage, random)
    return Problem(
        config=config,
        storage=storage,
        state=state,
        scales=scales,
        adapter=_adapter(config, random),
        tokens=random.randint(0, size.vocab, (2, size.length)).astype(np.int32),
    )


def _gaussian(random: np.random.RandomState, shape: tuple[int, ...], std: float) -> np.ndarray:
    """Nearly Gaussian float32 numbers: twelve uniform integers summed, exact up to one product."""
    total = sum(random.randint(-4096, 4097, shape).astype(np.float64) for _ in range(12))
    return np.asarray(total * (std / (4096.5 * 2.0)), np.float32)


def _weights(
    config: ModelConfig, storage: Storage, random: np.random.RandomState
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    state: dict[str, np.ndarray] = {}
    scales: dict[str, float] = {}
    shapes = {(*path.split("."), "weight"): shape for path, shape in config.linear_shapes.items()}
    for path, name in top_names(config).items():
        norm = path[-1] == "gain"
        shape = (config.hidden_size,) if norm else (config.vocab_size, config.hidden_size)
        state[name] = _gaussian(random, shape, 0.3 if norm else 1.0) + np.float32(norm)
    for i in range(config.num_layers):
        for path, name in layer_names(config).items():
            full = f"model.layers.{i}.{name}"
            if path in shapes:
                master = _gaussian(random, shapes[path], 0.5)
                state[full] = (
                    master if storage in ("online", "float") else np.sign(np.rint(master * 2))
                )
            else:
                width = {"mlp": config.ffn_size}.get(path[0], config.hidden_size)
                state[full] = _gaussian(random, (width,), 0.3) + np.float32(1)
        for module in LINEARS.values():
            # Of few bits, so that it and its reciprocal are the same scale in either convention.
            scales[f"model.layers.{i}.{module}"] = float(2.0 ** random.randint(-3, 0))
    return state, scales


def _adapter(config: ModelConfig, random: np.random.RandomState) -> dict[str, np.ndarray]:
    state: dict[str, np.ndarray] = {}
    for i in range(config.num_layers):
        for path, module in LINEARS.items():
            n, k = config.linear_shapes[".".join(path)]
            prefix = f"model.layers.{i}.{module}"
            state[f"{prefix}.lora_A.weight"] = _gaussian(random, (RANK, k), 0.2)
            state[f"{prefix}.lora_B.weight"] = _gaussian(random, (n, RANK), 0.2)
    return state


def checksum(problem: Problem) -> int:
    """CRC-32 of weights, scales, adapter and tokens, byte for byte."""
    crc = 0
    for name, array in sorted({**problem.state, **problem.adapter}.items()):
        crc = zlib.crc32(np.ascontiguousarray(array).tobytes(), zlib.crc32(name.encode(), crc))
    for name, scale in sorted(problem.scales.items()):
        crc = zlib.crc32(f"{name}={scale!r}".encode(), crc)
    return zlib.crc32(problem.tokens.tobytes(), crc)
