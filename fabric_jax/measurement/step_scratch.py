"""What a training step holds beside its arguments, from dimensions alone."""

from dataclasses import dataclass

import jax.numpy as jnp
from fabric_kernels import packed_width

from fabric_jax.layers.cross_entropy import LOGITS_TILE_BYTES, tile_tokens
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderOptions
from fabric_jax.parallel.axes import Cut, cut_of
from fabric_jax.parallel.mesh import FSDP, TENSOR, MeshShape

FLOAT32_BYTES = 4
# Rows are unpacked to floats in tiles of this size for the backward product (ternary_matmul/xla).
FLOAT_TILE_BYTES = 4 << 20
# The same for floats that are stored in another format (table_matmul/xla).
FROZEN_TILE_BYTES = 16 << 20
# Scores of attention go through tiles of queries of at most this size (attention/xla).
ATTENTION_TILE_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class StepScratch:
    """Bytes of a step's intermediate arrays; a floor, since a compiler adds copies of its own.

    Attributes:
        kept: what the forward pass leaves for the backward pass in all layers.
        layer: of the one layer that is being differentiated.
        attention: scores and weights of that layer.
        logits: a tile of them and its gradient.
        unpacked: the largest matrix of a layer as the product reads it; 0 where a kernel reads
            packed bytes.
        gathered: packed bytes of one layer, its parts on other devices included; 0 where weights
            are not cut along ``fsdp``.
        last: of the last layer, where it is kept through the loss.
    """

    kept: int
    layer: int
    attention: int
    logits: int
    unpacked: int
    gathered: int = 0
    last: int = 0

    @property
    def total(self) -> int:
        """What is held at once: the loss is done with before the first layer is differentiated."""
        layer = self.layer + self.attention + self.unpacked + self.gathered
        return self.kept + max(layer, self.last + self.logits)


def predict_scratch(
    config: ModelConfig,
    options: DecoderOptions,
    *,
    rows: int,
    length: int,
    kernels: bool,
    mesh: MeshShape | None = None,
) -> StepScratch:
    """The intermediate arrays of a LoRA step on ``rows`` rows of ``length`` positions.

    Args:
        config: what the model is.
        options: how it is stored and computed.
        rows: in a micro-batch, on all devices together.
        length: positions in a row.
        kernels: whether packed weights and attention run in kernels that keep their own scratch in
            a cache, as on CPU.
        mesh: what rows and weights are cut along; the result is that of each device.
    """
    mesh = mesh or MeshShape()
    rows //= mesh.row_shards
    item = jnp.dtype(options.dtype).itemsize
    tokens = rows * length
    d, f = config.hidden_size, config.ffn_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    # Residual stream, norms, projections, gates and their gradients; int8 inputs of the linears.
    live = item * (8 * d + 2 * q + 2 * kv + 6 * f) + (2 * d + q + f)
    linears = d + q + 2 * kv + 2 * f + 2 * d
    # The inputs of linears, norms and gates.
    everything = (linears + 4 * d + 2 * q + 3 * f) * item
    layers, last = config.num_layers, 0
    match options.remat:
        case "layer":
            kept = d * item
        case "offload":
            # The others are with the host: one is differentiated while the next one arrives.
            kept, layers, last = d * item, min(2, layers), everything
        case "int8-residuals":
            # The input as it is; codes and a scale of q, k, v, o, gate and up, and of down where a
            # norm reads it.
            read = q + 2 * kv + 2 * f + d + (d if config.post_norms else 0)
            kept = d * item + read + FLOAT32_BYTES * (7 if config.post_norms else 6)
        case "linears":
            kept = linears * item
        case "none":
            kept = everything
    scores = FLOAT32_BYTES * rows * config.num_heads * length * length
    return StepScratch(
        kept=layers * tokens * kept,
        layer=tokens * live,
        attention=0 if kernels else 4 * min(scores, ATTENTION_TILE_BYTES),
        logits=_logits(config, tokens, item),
        unpacked=0 if kernels else _unpacked(config, options, mesh),
        gathered=_gathered(config, options, mesh),
        last=tokens * last,
    )


def _logits(config: ModelConfig, tokens: int, item: int) -> int:
    """A tile of them and its gradient."""
    size = max(LOGITS_TILE_BYTES, 2 * tokens * config.hidden_size * item)
    tile = min(tokens, tile_tokens(tokens, config.vocab_size, size))
    return 2 * FLOAT32_BYTES * tile * config.vocab_size


def _unpacked(config: ModelConfig, options: DecoderOptions, mesh: MeshShape) -> int:
    """A whole matrix as int8 for the forward product, or a tile of it as floats."""
    if options.mode == "float":
        largest = max(n * k for n, k in config.linear_shapes.values())
        whole = largest * jnp.dtype(options.dtype).itemsize
        return min(FROZEN_TILE_BYTES, whole) if options.frozen else 0
    parts = [
        n * k // (mesh.tensor if options.mode == "packed" and TENSOR in cut.axes else 1)
        for (n, k), cut in _cuts(config, options, mesh)
    ]
    return max(FLOAT_TILE_BYTES, *parts)


def _gathered(config: ModelConfig, options: DecoderOptions, mesh: MeshShape) -> int:
    """Bytes of one layer's matrices that are cut along ``fsdp``, all of them gathered at once."""
    if options.mode != "packed":
        return 0
    return sum(
        n * packed_width(k, options.packing) // (mesh.tensor if TENSOR in cut.axes else 1)
        for (n, k), cut in _cuts(config, options, mesh)
        if FSDP in cut.axes
    )


def _cuts(
    config: ModelConfig, options: DecoderOptions, mesh: MeshShape
) -> list[tuple[tuple[int, int], Cut]]:
    """(N, K) of each linear, and how it is cut."""
    found: list[tuple[tuple[int, int], Cut]] = []
    for path, (n, k) in config.linear_shapes.items():
        width = packed_width(k, options.packing) if options.mode == "packed" else k
        found.append(((n, k), cut_of(path.split(".")[-1], n, width, mesh)))
    return found
