"""Prompts of token ids to generated token ids: checks, buckets, batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from fabric_jax.errors import FabricError
from fabric_jax.generation.config import GenerationConfig
from fabric_jax.generation.programs import Decode, Prefill, make_decode, make_prefill
from fabric_jax.generation.sampling import sampling_of
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderDefinition
from fabric_jax.models.initialize import Tree

SMALLEST_BUCKET = 16
_STOP_BUCKET = 8


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What followed one prompt.

    Attributes:
        tokens: new token ids, the stop token included where there was one.
        finish: whether a stop token or the limit of new tokens ended it.
    """

    tokens: tuple[int, ...]
    finish: Literal["stop", "length"]

    @property
    def answer(self) -> tuple[int, ...]:
        """The tokens without the stop token."""
        return self.tokens[:-1] if self.finish == "stop" else self.tokens


@dataclass(frozen=True, kw_only=True)
class Generator:
    """The programs of one model; each is compiled once for a batch, prompt bucket and capacity."""

    config: ModelConfig
    prefill: Prefill
    decode: Decode

    def __call__(
        self,
        base: Tree,
        adapter: Tree,
        prompts: Sequence[Sequence[int]],
        settings: GenerationConfig,
    ) -> list[Generated]:
        """Continues every prompt; the results are in the order of the prompts.

        Raises:
            FabricError: a prompt is empty, has an id outside the vocabulary, or doesn't fit the
                model or the cache with ``max_new_tokens`` after it.
        """
        rows = [np.asarray(prompt, np.int64).reshape(-1) for prompt in prompts]
        _check_prompts(rows, self.config, settings)
        size = settings.batch_size or len(rows)
        by_length = sorted(range(len(rows)), key=lambda i: -rows[i].size)
        results: dict[int, Generated] = {}
        for start in range(0, len(rows), max(size, 1)):
            members = by_length[start : start + size]
            batch = [rows[i] for i in members]
            answers = self._run(base, adapter, batch, members, size, settings)
            results.update(zip(members, answers, strict=True))
        return [results[i] for i in range(len(rows))]

    def _run(
        self,
        base: Tree,
        adapter: Tree,
        rows: list[NDArray[np.int64]],
        streams: list[int],
        size: int,
        settings: GenerationConfig,
    ) -> list[Generated]:
        """One batch, filled to ``size`` rows; ``streams`` number the rows' random streams."""
        limit = self.config.max_length
        longest = max(row.size for row in rows)
        capacity = settings.cache_length or bucket(longest + settings.max_new_tokens, limit)
        tokens, lengths = pad_right(rows, size, bucket(longest, capacity))
        root = jax.random.key(settings.seed)
        numbers = jnp.asarray(streams + [0] * (size - len(rows)), jnp.int32)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(root, numbers)
        stops = list(settings.stop_tokens)
        stops += [-1] * (-len(stops) % _STOP_BUCKET or (0 if stops else _STOP_BUCKET))
        method, sampling = sampling_of(settings)
        state = self.prefill(base, adapter, jnp.asarray(tokens), jnp.asarray(lengths), capacity)
        state = self.decode(
            base,
            adapter,
            state,
            keys,
            sampling,
            jnp.asarray(stops, jnp.int32),
            jnp.int32(settings.max_new_tokens),
            method,
        )
        generated, counts, done = jax.device_get((state.generated, state.counts, state.done))
        return [
            Generated(
                tokens=tuple(generated[i, : counts[i]].tolist()),
                finish="stop" if done[i] else "length",
            )
            for i in range(len(rows))
        ]


def make_generator(definition: DecoderDefinition) -> Generator:
    """The generator of a model; keep it, since what it compiles lives as long as it does."""
    return Generator(
        config=definition.config,
        prefill=make_prefill(definition),
        decode=make_decode(definition),
    )


def bucket(length: int, limit: int) -> int:
    """The power of two, at least 16, that ``length`` fits in; at most ``limit``."""
    return min(max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()), limit)


def pad_right(
    rows: Sequence[NDArray[np.int64]], size: int, width: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Token ids int32 [size, width], zeros behind each row, and the rows' lengths int32 [size]."""
    tokens = np.zeros((size, width), np.int32)
    lengths = np.zeros(size, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : row.size] = row
        lengths[i] = row.size
    return tokens, lengths


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
