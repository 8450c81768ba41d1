"""The two compiled programs of generation: prefill and decode."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from fabric_jax.generation.sampling import Method, Sampling, choose_tokens
from fabric_jax.layers.kv_cache import KVCache, empty_cache
from fabric_jax.models.decoder import DecoderDefinition
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
    """

    cache: KVCache
    lengths: Int32[Array, "B"]
    last: Int32[Array, "B"]
    generated: Int32[Array, "B S"]
    counts: Int32[Array, "B"]
    done: Bool[Array, "B"]
    step: Int32[Array, ""]


Prefill = Callable[[Tree, Tree, jax.Array, jax.Array, int], DecodeState]
Decode = Callable[
    [Tree, Tree, DecodeState, jax.Array, Sampling, jax.Array, jax.Array, Method], DecodeState
]


def make_prefill(definition: DecoderDefinition) -> Prefill:
    """Compiled ``(base, adapter, prompts[B, T], lengths[B], capacity) -> DecodeState``.

    Prompts are padded on the right with any token; a row of length 0 is padding and generates
    nothing. The last token of a prompt is left to the first decode step, so that the head and the
    choice of tokens are in one program. What padding writes into the cache lies beyond
    ``lengths`` and is overwritten before a query may see it.
    """
    config, dtype = definition.config, definition.options.dtype

    @partial(jax.jit, static_argnums=(4,))
    def prefill(
        base: Tree,
        adapter: Tree,
        prompts: Int32[Array, "B T"],
        lengths: Int32[Array, "B"],
        capacity: int,
    ) -> DecodeState:
        batch, width = prompts.shape
        cache = empty_cache(
            config.num_layers, batch, capacity, config.num_kv_heads, config.head_dim, dtype
        )
        positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None, :], (batch, width))
        _, cache = definition.bind(base, adapter).extend(prompts, positions, cache)
        before_last = jnp.maximum(lengths - 1, 0)
        return DecodeState(
            cache=cache,
            lengths=before_last,
            last=jnp.take_along_axis(prompts, before_last[:, None], axis=1)[:, 0],
            generated=jnp.zeros((batch, capacity), jnp.int32),
            counts=jnp.zeros(batch, jnp.int32),
            done=lengths == 0,
            step=jnp.int32(0),
        )

    return prefill


def make_decode(definition: DecoderDefinition) -> Decode:
    """Compiled ``(base, adapter, state, keys[B], sampling, stops[N], limit[], method) -> state``.

    Runs on the device until ``limit`` steps are done since prefill or every row is. ``stops`` are
    token ids (-1 matches none); token t of row i is drawn with ``keys[i]`` folded with t. The state
    is donated, and the one returned can be passed in again with a higher limit.
    """

    @partial(jax.jit, static_argnums=(7,), donate_argnums=(2,))
    def decode(
        base: Tree,
        adapter: Tree,
        state: DecodeState,
        keys: jax.Array,
        sampling: Sampling,
        stops: Int32[Array, "N"],
        limit: Int32[Array, ""],
        method: Method,
    ) -> DecodeState:
        decoder = definition.bind(base, adapter)

        def going(state: DecodeState) -> jax.Array:
            return (state.step < limit) & ~jnp.all(state.done)

        def advance(state: DecodeState) -> DecodeState:
            hidden, cache = decoder.extend(state.last[:, None], state.lengths[:, None], state.cache)
            step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, state.step)
            token = choose_tokens(decoder.logits(hidden[:, 0]), step_keys, sampling, method)
            token = jnp.where(state.done, 0, token)
            stopped = jnp.any(token[:, None] == stops[None, :], axis=1)
            return replace(
                state,
                cache=cache,
                lengths=state.lengths + 1,
                last=token,
                generated=state.generated.at[:, state.step].set(token),
                counts=jnp.where(state.done, state.counts, state.step + 1),
                done=state.done | stopped,
                step=state.step + 1,
            )

        return lax.while_loop(going, advance, state)

    return decode
