"""The two compiled programs of generation: prefill and decode."""

import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int32

from fabric_jax.generation.on_mesh import (
    CACHE_ROWS,
    agreed_tokens,
    any_row,
    of_rows,
    over_devices,
    state_specs,
    weights_specs,
)
from fabric_jax.generation.sampling import (
    Method,
    Sampling,
    choose_tokens,
    penalize,
    token_log_probs,
)
from fabric_jax.generation.state import DecodeState, Weights
from fabric_jax.layers.kv_cache import KVCache
from fabric_jax.models.decoder import DecoderDefinition
from fabric_jax.parallel.placement import ROWS, WHOLE, shape_of


def steps_between_looks() -> int:
    """Steps between two looks at whether all rows are done; fewer where the limit is near.

    The host reads the condition of a loop whose length it doesn't know, and a GPU waits for it. So
    a batch that ends early goes on for some steps, as rows do that end before others.
    """
    return 4 if jax.default_backend() == "gpu" else 1


@dataclass(kw_only=True)
class Program:
    """A jitted function that is compiled once for each layout of its arguments, and says when.

    Attributes:
        function: what is compiled; its static arguments are given by name.
        compile_seconds: spent so far.
        compiled: what exists, by layout.
    """

    function: Any
    compile_seconds: float = 0.0
    compiled: dict[Any, Any] = field(default_factory=dict[Any, Any])

    def __call__(self, *arguments: Any, **static: Any) -> DecodeState:
        """The function's result."""
        leaves, tree = jax.tree.flatten(arguments)
        layout = tuple((leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves)
        key = (tree, layout, tuple(sorted(static.items())))
        if key not in self.compiled:
            start = time.perf_counter()
            self.compiled[key] = self.function.lower(*arguments, **static).compile()
            self.compile_seconds += time.perf_counter() - start
        return self.compiled[key](*arguments)


def make_prefill(definition: DecoderDefinition, mesh: Mesh | None = None) -> Program:
    """``(weights, cache, prompts[B, T], starts[B], lengths[B], seen, *, slots, log_probs)``.

    Returns the state before the first decode step. ``prompts`` are the tokens from position
    ``starts`` on, below which the cache holds what they follow; ``lengths`` count them. They are
    padded on the right with any token; a row of length 0 is padding and generates nothing. The last
    token of a prompt is left to the first decode step, so that the head and the choice of tokens
    are in one program. What padding writes into the cache lies beyond the row's length and is
    overwritten before a query may see it. The cache is donated; no prompt reaches beyond ``slots``
    of it. ``seen`` goes into the state.

    With a ``mesh`` of several devices the base is cut along it, and B is divided by their rows.
    """
    own = definition if mesh is None else definition.on_mesh(shape_of(mesh))

    def read(
        weights: Weights,
        cache: KVCache,
        prompts: Int32[Array, "B T"],
        starts: Int32[Array, "B"],
        lengths: Int32[Array, "B"],
        seen: Bool[Array, "B V"] | None,
        *,
        slots: int,
        log_probs: bool,
    ) -> DecodeState:
        positions = starts[:, None] + jnp.arange(prompts.shape[1], dtype=jnp.int32)[None, :]
        _, cache = own.bind(weights.base, weights.adapter).extend(
            prompts, positions, cache, slots=slots, adapter_ids=weights.adapter_ids
        )
        return _unbegun(cache, prompts, starts, lengths, seen, log_probs=log_probs)

    @partial(jax.jit, static_argnames=("slots", "log_probs"), donate_argnums=(1,))
    def prefill(
        weights: Weights,
        cache: KVCache,
        *rows: Any,
        slots: int,
        log_probs: bool,
    ) -> DecodeState:
        program = partial(read, slots=slots, log_probs=log_probs)
        if mesh is None:
            return program(weights, cache, *rows)
        of_weights = weights_specs(weights, definition, mesh)
        of_cache = jax.tree.map(lambda _: CACHE_ROWS, cache)
        shapes = jax.eval_shape(partial(_unbegun, log_probs=log_probs), cache, *rows)
        specs = (of_weights, of_cache, *of_rows(rows))
        return over_devices(program, mesh, specs, state_specs(shapes))(weights, cache, *rows)

    return Program(function=prefill)


def _unbegun(
    cache: KVCache,
    prompts: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    seen: jax.Array | None,
    *,
    log_probs: bool,
) -> DecodeState:
    """The state of prompts whose tokens but the last are in the cache."""
    batch = prompts.shape[0]
    before_last = jnp.maximum(lengths - 1, 0)
    shape = (batch, cache.capacity)
    return DecodeState(
        cache=cache,
        lengths=starts + before_last,
        last=jnp.take_along_axis(prompts, before_last[:, None], axis=1)[:, 0],
        generated=jnp.zeros(shape, jnp.int32),
        counts=jnp.zeros(batch, jnp.int32),
        done=lengths == 0,
        step=jnp.int32(0),
        log_probs=jnp.zeros(shape, jnp.float32) if log_probs else None,
        seen=seen,
    )


def make_decode(definition: DecoderDefinition, mesh: Mesh | None = None) -> Program:
    """``(weights, state, keys[B], sampling, stops[N], limit[], ended[B], *, method) -> state``.

    Runs on the device until ``limit`` steps are done since prefill or every row is. ``stops`` are
    token ids (-1 matches none); token t of row i is drawn with ``keys[i]`` folded with t; rows that
    ``ended`` are done before the first step. The state is donated, and the one returned can be
    passed in again with a higher limit.

    A ``mesh`` is as for :func:`make_prefill`; all its devices take the same number of steps.
    """
    own = definition if mesh is None else definition.on_mesh(shape_of(mesh))

    @partial(jax.jit, static_argnames=("method",), donate_argnums=(1,))
    def decode(
        weights: Weights,
        state: DecodeState,
        keys: jax.Array,
        sampling: Sampling,
        stops: Int32[Array, "N"],
        limit: Int32[Array, ""],
        ended: Bool[Array, "B"],
        *,
        method: Method,
    ) -> DecodeState:
        program = partial(_steps, own, method)
        if mesh is None:
            return program(weights, state, keys, sampling, stops, limit, ended)
        of_state = state_specs(state)
        of_weights = weights_specs(weights, definition, mesh)
        specs = (of_weights, of_state, ROWS, WHOLE, WHOLE, WHOLE, ROWS)
        mapped = over_devices(program, mesh, specs, of_state)
        return mapped(weights, state, keys, sampling, stops, limit, ended)

    return Program(function=decode)


def _steps(
    definition: DecoderDefinition,
    method: Method,
    weights: Weights,
    state: DecodeState,
    keys: jax.Array,
    sampling: Sampling,
    stops: jax.Array,
    limit: jax.Array,
    ended: jax.Array,
) -> DecodeState:
    """The loop of :func:`make_decode` over the rows of a device."""
    decoder, mesh = definition.bind(weights.base, weights.adapter), definition.options.mesh

    def going(carry: tuple[DecodeState, jax.Array]) -> jax.Array:
        state, unfinished = carry
        return (state.step < limit) & unfinished

    def advance(carry: tuple[DecodeState, jax.Array]) -> tuple[DecodeState, jax.Array]:
        state, _ = carry
        hidden, cache = decoder.extend(
            state.last[:, None],
            state.lengths[:, None],
            state.cache,
            adapter_ids=weights.adapter_ids,
        )
        step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, state.step)
        logits = decoder.logits(hidden[:, 0])
        scores = logits
        if state.seen is not None:
            scores = penalize(logits, state.seen, sampling)
        token = agreed_tokens(mesh, choose_tokens(scores, step_keys, sampling, method))
        token = jnp.where(state.done, 0, token)
        state = _taken(replace(state, cache=cache), token, logits, stops)
        return state, any_row(mesh, ~jnp.all(state.done))

    state = replace(state, done=state.done | ended)
    carry = (state, any_row(mesh, ~jnp.all(state.done)))
    count = steps_between_looks()
    if count > 1:

        def far(carry: tuple[DecodeState, jax.Array]) -> jax.Array:
            return going(carry) & (carry[0].step + count <= limit)

        def several(carry: tuple[DecodeState, jax.Array]) -> tuple[DecodeState, jax.Array]:
            return lax.fori_loop(0, count, lambda _, carry: advance(carry), carry)

        carry = lax.while_loop(far, several, carry)
    return lax.while_loop(going, advance, carry)[0]


def _taken(
    state: DecodeState, token: jax.Array, logits: jax.Array, stops: jax.Array
) -> DecodeState:
    """The state after ``token`` [B] was chosen, with the cache of its step already in it."""
    rows = jnp.arange(token.shape[0], dtype=jnp.int32)
    seen, log_probs = state.seen, state.log_probs
    if seen is not None:
        seen = seen.at[rows, token].set(True)
    if log_probs is not None:
        log_probs = _with_column(log_probs, state.step, token_log_probs(logits, token))
    stopped = jnp.any(token[:, None] == stops[None, :], axis=1)
    return replace(
        state,
        lengths=state.lengths + 1,
        last=token,
        generated=_with_column(state.generated, state.step, token),
        counts=jnp.where(state.done, state.counts, state.step + 1),
        done=state.done | stopped,
        step=state.step + 1,
        log_probs=log_probs,
        seen=seen,
    )


def _with_column(array: jax.Array, index: jax.Array, column: jax.Array) -> jax.Array:
    """[B, S] with one of its columns replaced; one kernel, where an index is checked in another."""
    return lax.dynamic_update_slice_in_dim(array, column[:, None], index, 1)
