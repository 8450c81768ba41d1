"""What a training step holds beside its arguments, from dimensions alone."""

from dataclasses import dataclass

import jax.numpy as jnp

from fabric_jax.layers.cross_entropy import LOGITS_TILE_BYTES, tile_tokens
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderOptions

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
    """

    kept: int
    layer: int
    attention: int
    logits: int
    unpacked: int

    @property
    def total(self) -> int:
        """What is held at once: the loss is done with before the first layer is differentiated."""
        return self.kept + max(self.layer + self.attention + self.unpacked, self.logits)


def predict_scratch(
    config: ModelConfig, options: DecoderOptions, *, rows: int, length: int, kernels: bool
) -> StepScratch:
    """The intermediate arrays of a LoRA step on ``rows`` rows of ``length`` positions.

    Args:
        config: what the model is.
        options: how it is stored and computed.
        rows: in a micro-batch.
        length: positions in a row.
        kernels: whether packed weights and attention run in kernels that keep their own scratch in
            a cache, as on CPU.
    """
    item = jnp.dtype(options.dtype).itemsize
    tokens = rows * length
    d, f = config.hidden_size, config.ffn_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    # Residual stream, norms, projections, gates and their gradients; int8 inputs of the linears.
    live = item * (8 * d + 2 * q + 2 * kv + 6 * f) + (2 * d + q + f)
    linears = d + q + 2 * kv + 2 * f + 2 * d
    match options.remat:
        case "layer":
            kept = d * item
        case "int8-residuals":
            # The input as it is; codes and a scale of q, k, v, o, gate and up, and of down where a
            # norm reads it.
            read = q + 2 * kv + 2 * f + d + (d if config.post_norms else 0)
            kept = d * item + read + FLOAT32_BYTES * (7 if config.post_norms else 6)
        case "linears":
            kept = linears * item
        case "none":
            # The inputs of the linears too, and of norms and gates.
            kept = (linears + 4 * d + 2 * q + 3 * f) * item
    scores = FLOAT32_BYTES * rows * config.num_heads * length * length
    tile = min(
        tokens,
        tile_tokens(tokens, config.vocab_size, max(LOGITS_TILE_BYTES, 2 * tokens * d * item)),
    )
    return StepScratch(
        kept=config.num_layers * tokens * kept,
        layer=tokens * live,
        attention=0 if kernels else 4 * min(scores, ATTENTION_TILE_BYTES),
        logits=2 * FLOAT32_BYTES * tile * config.vocab_size,
        unpacked=0 if kernels else _unpacked(config, options),
    )


def _unpacked(config: ModelConfig, options: DecoderOptions) -> int:
    """A whole matrix as int8 for the forward product, or a tile of it as floats."""
    largest = max(n * k for n, k in config.linear_shapes.values())
    if options.mode == "float":
        whole = largest * jnp.dtype(options.dtype).itemsize
        return min(FROZEN_TILE_BYTES, whole) if options.frozen else 0
    return max(FLOAT_TILE_BYTES, largest)
