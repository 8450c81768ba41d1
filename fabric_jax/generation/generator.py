"""Prompts of token ids to generated token ids: checks, buckets, batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from numpy.typing import NDArray

from fabric_jax.errors import FabricError
from fabric_jax.generation.config import GenerationConfig
from fabric_jax.generation.on_mesh import CACHE_ROWS
from fabric_jax.generation.programs import Program, make_decode, make_prefill
from fabric_jax.generation.session import Batch, Cached, Generated, Session, Stats, pad_right
from fabric_jax.generation.state import Weights
from fabric_jax.layers.kv_cache import KVCache, empty_cache
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderDefinition
from fabric_jax.models.initialize import Tree
from fabric_jax.parallel.placement import shape_of

__all__ = ["Cached", "Generator", "bucket", "check_ids", "make_generator", "pad_right"]

SMALLEST_BUCKET = 16
WATCHED_STEPS = 16
"""Steps of one dispatch where the caller looks at the tokens in between."""

Watch = Callable[[int, tuple[int, ...]], bool]
"""``(prompt, its new tokens so far) -> whether it has ended``, asked between dispatches."""


@dataclass(frozen=True, kw_only=True)
class Generator:
    """The programs of one model; each is compiled once for a batch, prompt bucket and capacity.

    On a mesh of several devices base and adapter lie there, and a batch is filled up with empty
    rows to what the devices divide.
    """

    config: ModelConfig
    dtype: str
    prefill: Program
    decode: Program
    mesh: Mesh | None = None

    def __call__(
        self,
        base: Tree,
        adapter: Tree,
        prompts: Sequence[Sequence[int]],
        settings: GenerationConfig,
        *,
        adapter_ids: Sequence[int] | None = None,
        watch: Watch | None = None,
        report: Callable[[Stats], None] | None = None,
    ) -> list[Generated]:
        """Continues every prompt; the results are in the order of the prompts.

        Args:
            base: the base weights.
            adapter: the adapter, or a stack of several (``generation.adapters``).
            prompts: token ids.
            settings: how.
            adapter_ids: of a stack, each prompt's.
            watch: ends rows between dispatches, which then are of ``WATCHED_STEPS`` steps.
            report: is given the times of every batch.

        Raises:
            FabricError: a prompt is empty, has an id outside the vocabulary, or doesn't fit the
                model or the cache with ``max_new_tokens`` after it.
        """
        rows = self.check(prompts, settings)
        size = min(settings.batch_size or len(rows), len(rows))
        by_length = sorted(range(len(rows)), key=lambda i: -rows[i].size)
        results: dict[int, Generated] = {}
        for start in range(0, len(rows), max(size, 1)):
            members = by_length[start : start + size]
            filled = filled_rows(size, self.mesh)
            weights = _weights(base, adapter, adapter_ids, members, filled)
            batch = self._batch([rows[i] for i in members], members, filled, settings)
            session = self._session(weights, batch, settings)
            session.start(self._empty(batch, settings))
            _run(session, members, watch)
            results |= {i: session.generated(row) for row, i in enumerate(members)}
            if report is not None:
                report(session.stats)
        return [results[i] for i in range(len(rows))]

    def start(
        self,
        base: Tree,
        adapter: Tree,
        prompt: Sequence[int],
        settings: GenerationConfig,
        *,
        adapter_id: int | None = None,
        cached: Cached | None = None,
    ) -> Session:
        """A session of one prompt, read and ready to be advanced.

        What ``cached`` has in common with the prompt is not computed again.

        Raises:
            FabricError: as ``__call__``.
        """
        row = self.check([prompt], settings)[0]
        ids = None if adapter_id is None else [adapter_id]
        filled = filled_rows(1, self.mesh)
        weights = _weights(base, adapter, ids, [0], filled)
        batch = self._batch([row], [0], filled, settings)
        if cached is None or row.size + settings.max_new_tokens > cached.cache.capacity:
            session = self._session(weights, batch, settings)
            session.start(self._empty(batch, settings))
            return session
        # The last token is read by the first decode step and has to be among the new ones.
        kept = min(_common(cached.tokens, prompt), row.size - 1)
        width = bucket(row.size - kept, cached.cache.capacity)
        slots = bucket(row.size, cached.cache.capacity)
        batch = replace(batch, rows=[row[kept:]], starts=[kept], width=width, slots=slots)
        session = self._session(weights, batch, settings)
        session.start(cached.cache)
        return session

    def check(
        self, prompts: Sequence[Sequence[int]], settings: GenerationConfig
    ) -> list[NDArray[np.int64]]:
        """The prompts as arrays.

        Raises:
            FabricError: one of them is empty, has an id outside the vocabulary, or doesn't fit.
        """
        rows = [np.asarray(prompt, np.int64).reshape(-1) for prompt in prompts]
        _check_prompts(rows, self.config, settings)
        return rows

    def _session(self, weights: Weights, batch: Batch, settings: GenerationConfig) -> Session:
        return Session(
            prefill=self.prefill,
            decode=self.decode,
            weights=weights,
            batch=batch,
            settings=settings,
        )

    def _batch(
        self,
        rows: list[NDArray[np.int64]],
        streams: list[int],
        size: int,
        settings: GenerationConfig,
    ) -> Batch:
        """A batch of prompts of which nothing is cached."""
        longest = max(row.size for row in rows)
        capacity = self._capacity(longest, settings)
        width, seen = bucket(longest, capacity), None
        if settings.repetition_penalty != 1:
            seen = np.zeros((size, self.config.vocab_size), np.bool_)
            for i, row in enumerate(rows):
                seen[i, row] = True
        starts = [0] * len(rows)
        return Batch(
            rows=rows,
            starts=starts,
            size=size,
            streams=streams,
            width=width,
            slots=width,
            seen=seen,
        )

    def _capacity(self, longest: int, settings: GenerationConfig) -> int:
        limit = self.config.max_length
        return settings.cache_length or bucket(longest + settings.max_new_tokens, limit)

    def _empty(self, batch: Batch, settings: GenerationConfig) -> KVCache:
        longest = max(row.size for row in batch.rows)
        return _empty_cache(
            self.config.num_layers,
            batch.size,
            self._capacity(longest, settings),
            self.config.num_kv_heads,
            self.config.head_dim,
            settings.cache_dtype or self.dtype,
            self.mesh,
        )


@partial(jax.jit, static_argnums=range(7))
def _empty_cache(
    layers: int,
    batch: int,
    capacity: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    mesh: Mesh | None,
) -> KVCache:
    cache = empty_cache(layers, batch, capacity, kv_heads, head_dim, dtype)
    if mesh is None:
        return cache
    return lax.with_sharding_constraint(cache, NamedSharding(mesh, CACHE_ROWS))


def filled_rows(rows: int, mesh: Mesh | None) -> int:
    """``rows``, filled up to what the devices of a mesh divide."""
    parts = 1 if mesh is None else shape_of(mesh).row_shards
    return -(-rows // parts) * parts


def make_generator(definition: DecoderDefinition, mesh: Mesh | None = None) -> Generator:
    """The generator of a model; keep it, since what it compiles lives as long as it does.

    Args:
        definition: of the decoder.
        mesh: of several devices, along which the base is cut (``models.on_mesh``); None for one.
    """
    return Generator(
        config=definition.config,
        dtype=jnp.dtype(definition.options.dtype).name,
        prefill=make_prefill(definition, mesh),
        decode=make_decode(definition, mesh),
        mesh=mesh,
    )


def bucket(length: int, limit: int) -> int:
    """The power of two, at least 16, that ``length`` fits in; at most ``limit``."""
    return min(max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()), limit)


def check_ids(tokens: NDArray[np.int64], vocab_size: int, what: str) -> None:
    """Refuses ids that the embedding has no row for; a lookup would silently take another."""
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        wrong = int(tokens.min()) if tokens.min() < 0 else int(tokens.max())
        raise FabricError(
            f"{what} has a token id outside the model's vocabulary",
            expected=f"0 to {vocab_size - 1}",
            found=str(wrong),
            fix="Use the tokenizer that belongs to the model",
        )


def _run(session: Session, members: Sequence[int], watch: Watch | None) -> None:
    """Advances a session to its end; the first step alone, so that its time is known."""
    session.advance(1)
    while not session.done:
        if watch is not None:
            for row, i in enumerate(members):
                if watch(i, session.tokens(row)):
                    session.end(row)
            if session.done:
                break
        limit = session.settings.max_new_tokens
        session.advance(limit if watch is None else WATCHED_STEPS)


def _weights(
    base: Tree,
    adapter: Tree,
    adapter_ids: Sequence[int] | None,
    members: Sequence[int],
    size: int,
) -> Weights:
    if adapter_ids is None:
        return Weights(base=base, adapter=adapter)
    own = [adapter_ids[i] for i in members] + [0] * (size - len(members))
    return Weights(base=base, adapter=adapter, adapter_ids=jnp.asarray(own, jnp.int32))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading tokens both have."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def _check_prompts(
    rows: Sequence[NDArray[np.int64]], config: ModelConfig, settings: GenerationConfig
) -> None:
    capacity = settings.cache_length or config.max_length
    if capacity > config.max_length:
        raise FabricError(
            f"a cache of {capacity} positions is longer than {config.name} allows",
            expected=f"at most {config.max_length}",
        )
    holder = "the cache holds" if settings.cache_length else f"{config.name} allows"
    for i, row in enumerate(rows):
        if row.size == 0:
            raise FabricError(
                f"prompt {i} is empty", expected="at least one token, such as begin-of-text"
            )
        check_ids(row, config.vocab_size, f"prompt {i}")
        if row.size + settings.max_new_tokens > capacity:
            raise FabricError(
                f"prompt {i} has {row.size} tokens, which with {settings.max_new_tokens} new ones "
                f"is more than the {capacity} positions that {holder}",
                fix=_how_to_fit(row.size, settings.max_new_tokens, capacity),
            )


def _how_to_fit(length: int, new: int, capacity: int) -> str:
    if length < capacity:
        return f"Lower max_new_tokens to {capacity - length} or less"
    if new < capacity:
        return f"Shorten the prompt to {capacity - new} tokens or less"
    return f"Shorten the prompt below {capacity} tokens and lower max_new_tokens"
