"""Which decoders take a step of decoding through all layers at once."""

from typing import TYPE_CHECKING

import jax.numpy as jnp
from fabric_kernels.decoding import LayerStacks, why_not
from fabric_kernels.ternary_matmul import resolve, select_implementation

from fabric_jax.layers.bit_linear import takes_prologue
from fabric_jax.layers.kv_cache import KVCache
from fabric_jax.models.config import ModelConfig

if TYPE_CHECKING:
    from fabric_jax.models.decoder import Block


def layer_stacks(
    layers: "Block", config: ModelConfig, cache: KVCache, rows: int
) -> LayerStacks | None:
    """The layers for ``decode_layers``, a row a token; None where they go one by one.

    They do unless Triton's kernels would run every product, in a model without adapters whose
    layers are Llama's or BitNet's (no norms of heads or of what is added, no windows).

    Args:
        layers: with stacks as parameters.
        config: of the model.
        cache: of that many rows.
        rows: B.
    """
    attention, mlp = layers.attention, layers.mlp
    activation = mlp.activation
    linears = [attention.q, attention.k, attention.v, attention.o, mlp.gate, mlp.up, mlp.down]
    empty = jnp.zeros((rows, 1, config.hidden_size), layers.attention_norm.gain.dtype)
    norms = (layers.attention_norm, attention.sub_norm, layers.mlp_norm, mlp.sub_norm)
    if (
        activation == "gelu"
        or attention.q.options.sides is not None
        or config.qk_norm
        or config.post_norms
        or config.sliding_window is not None
        or any(norm is not None and norm.offset for norm in norms)
        or not takes_prologue(linears, empty, None)
    ):
        return None
    implementation = select_implementation(attention.q.options.implementation)
    weights = [linear.packed(None) for linear in linears]
    if any(resolve(implementation, "linear", rows, one) != "triton" for one in weights):
        return None
    gains = [None if norm is None else norm.gain[...] for norm in norms]
    assert gains[0] is not None
    assert gains[2] is not None
    stacks = LayerStacks(
        **dict(zip(("q", "k", "v", "o", "gate", "up", "down"), weights, strict=True)),
        attention_gain=gains[0],
        sub_gain=gains[1],
        mlp_gain=gains[2],
        mlp_sub_gain=gains[3],
        activation=activation,
        eps=config.norm_eps,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
    )
    return stacks if why_not(stacks, cache, rows) is None else None
