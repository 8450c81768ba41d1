"""What the programs of generation take and give back."""

from dataclasses import dataclass

import jax
from jaxtyping import Array, Bool, Float32, Int32

from fabric_jax.layers.kv_cache import KVCache
from fabric_jax.models.initialize import Tree


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DecodeState:
    """A batch in the middle of generation. S is the capacity of the cache.

    Attributes:
        cache: keys and values of the positions below ``lengths``.
        lengths: positions of each row that the cache holds.
        last: the token of each row that comes next into the cache.
        generated: new tokens, from the left; 0 after a row's end.
        counts: new tokens of each row, a stop token included.
        done: rows that have met a stop token, or never began.
        step: decode steps done.
        log_probs: of the new tokens, nats; None where nobody asked.
        seen: tokens of the prompt and the answer; None without a repetition penalty.
    """

    cache: KVCache
    lengths: Int32[Array, "B"]
    last: Int32[Array, "B"]
    generated: Int32[Array, "B S"]
    counts: Int32[Array, "B"]
    done: Bool[Array, "B"]
    step: Int32[Array, ""]
    log_probs: Float32[Array, "B S"] | None = None
    seen: Bool[Array, "B V"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Weights:
    """What a program computes with.

    Attributes:
        base: the base tree.
        adapter: the adapter tree, or a stack of several.
        adapter_ids: of such a stack, the number of each row's, int32 [B]; else None.
    """

    base: Tree
    adapter: Tree
    adapter_ids: jax.Array | None = None
