"""One batch being generated: its state on the device, its tokens so far, its times."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from fabric_jax.generation.config import GenerationConfig
from fabric_jax.generation.programs import Program
from fabric_jax.generation.sampling import Method, Sampling, sampling_of
from fabric_jax.generation.state import DecodeState, Weights
from fabric_jax.layers.kv_cache import KVCache

_STOP_BUCKET = 8

Finish = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What followed one prompt.

    Attributes:
        tokens: new token ids, the stop token included where there was one.
        finish: whether a stop token, the limit of new tokens or the caller ended it.
        log_probs: of each of them under the model itself, nats; None where nobody asked.
    """

    tokens: tuple[int, ...]
    finish: Finish
    log_probs: tuple[float, ...] | None = None

    @property
    def answer(self) -> tuple[int, ...]:
        """The tokens without the stop token."""
        return self.tokens[:-1] if self.finish == "stop" else self.tokens


@dataclass(frozen=True, kw_only=True)
class Stats:
    """How long a batch took, compilation left out.

    Attributes:
        prompt_tokens: of all rows, those that a cache held already left out.
        new_tokens: of all rows.
        prefill_seconds: from the prompts to the full cache.
        first_token_seconds: from the prompts to the first new token of each row.
        decode_seconds: from there to the end.
        compile_seconds: besides these.
        decoded: new tokens after the first step.
    """

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    first_token_seconds: float
    decode_seconds: float
    compile_seconds: float
    decoded: int

    @property
    def prefill_rate(self) -> float:
        """Tokens a second."""
        return self.prompt_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode_rate(self) -> float:
        """New tokens a second after the first ones; 0 where there were no others."""
        return self.decoded / max(self.decode_seconds, 1e-9) if self.decoded else 0.0

    def __add__(self, other: "Stats") -> "Stats":
        """Of two batches, one after the other; the first token is the earlier one's."""
        return Stats(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            new_tokens=self.new_tokens + other.new_tokens,
            prefill_seconds=self.prefill_seconds + other.prefill_seconds,
            first_token_seconds=self.first_token_seconds,
            decode_seconds=self.decode_seconds + other.decode_seconds,
            compile_seconds=self.compile_seconds + other.compile_seconds,
            decoded=self.decoded + other.decoded,
        )


@dataclass(frozen=True, kw_only=True)
class Cached:
    """A cache of one row that a session left, to be continued by another.

    Attributes:
        tokens: whose keys and values it holds.
        cache: donated to the session that continues it.
    """

    tokens: tuple[int, ...]
    cache: KVCache


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The prompts of one batch, filled to a size.

    Attributes:
        rows: token ids that the cache does not hold yet.
        starts: positions of their first tokens.
        size: rows of the programs; those after the last are padding.
        streams: numbers of the rows' random streams.
        width: positions of the prefill.
        slots: of the cache that the prefill reads.
        seen: bool [size, V], tokens of the whole prompts; None without a repetition penalty.
    """

    rows: Sequence[NDArray[np.int64]]
    starts: Sequence[int]
    size: int
    streams: Sequence[int]
    width: int
    slots: int
    seen: NDArray[np.bool_] | None


@dataclass(kw_only=True)
class Session:
    """A batch in the middle of generation; ``advance`` takes it further.

    Attributes:
        prefill: the compiled program.
        decode: likewise.
        weights: of the model.
        batch: its prompts.
        settings: of the call.
        state: on the device.
        step: decode steps done.
    """

    prefill: Program
    decode: Program
    weights: Weights
    batch: Batch
    settings: GenerationConfig
    state: DecodeState = field(init=False)
    step: int = 0
    _ended: NDArray[np.bool_] = field(init=False)
    _done: NDArray[np.bool_] = field(init=False)
    _counts: NDArray[np.int32] = field(init=False)
    _generated: NDArray[np.int32] = field(init=False)
    _arguments: tuple[jax.Array, Sampling, jax.Array] = field(init=False)
    _method: Method = field(init=False)
    _seconds: dict[str, float] = field(init=False)
    _compiled_before: float = 0.0
    _first_count: int = 0

    def start(self, cache: KVCache) -> None:
        """Reads the prompts; ``cache`` is donated."""
        batch = self.batch
        tokens, lengths = pad_right(batch.rows, batch.size, batch.width)
        starts = np.zeros(batch.size, np.int32)
        starts[: len(batch.starts)] = batch.starts
        self._ended = np.zeros(batch.size, np.bool_)
        self._done = np.asarray(lengths == 0)
        self._counts = np.zeros(batch.size, np.int32)
        self._generated = np.zeros((batch.size, 0), np.int32)
        self._seconds = {"prefill": 0.0, "first": 0.0, "decode": 0.0}
        self._compiled_before = self._compile_seconds()
        self._choose()
        begin = self._clock()
        self.state = self.prefill(
            self.weights,
            cache,
            jnp.asarray(tokens),
            jnp.asarray(starts),
            jnp.asarray(lengths),
            None if batch.seen is None else jnp.asarray(batch.seen),
            slots=batch.slots,
            log_probs=self.settings.log_probs,
        )
        jax.block_until_ready(self.state)
        self._seconds["prefill"] = self._clock() - begin

    def _choose(self) -> None:
        """What tokens are drawn with and where they stop."""
        root = jax.random.key(self.settings.seed)
        numbers = [*self.batch.streams, *[0] * (self.batch.size - len(self.batch.streams))]
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
            root, jnp.asarray(numbers, jnp.int32)
        )
        stops = list(self.settings.stop_tokens)
        stops += [-1] * (-len(stops) % _STOP_BUCKET or (0 if stops else _STOP_BUCKET))
        self._method, sampling = sampling_of(self.settings)
        self._arguments = (keys, sampling, jnp.asarray(stops, jnp.int32))

    @property
    def done(self) -> bool:
        """Whether every row has ended."""
        limit = self.settings.max_new_tokens
        return self.step >= limit or bool(np.all(self._done | self._ended))

    def advance(self, steps: int) -> None:
        """Decodes that many steps in one dispatch, fewer where the rows end before."""
        begin, first = self._clock(), self.step == 0
        limit = min(self.step + steps, self.settings.max_new_tokens)
        self.state = self.decode(
            self.weights,
            self.state,
            *self._arguments,
            jnp.int32(limit),
            jnp.asarray(self._ended),
            method=self._method,
        )
        state = self.state
        step, counts, done, generated = jax.device_get(
            (state.step, state.counts, state.done, state.generated)
        )
        self.step, self._counts, self._generated = int(step), counts, generated
        # The device counts a row that we ended as done.
        self._done = done
        self._seconds["first" if first else "decode"] += self._clock() - begin
        if first:
            self._first_count = int(counts.sum())

    def end(self, row: int) -> None:
        """No more tokens for a row."""
        self._ended[row] = True

    def tokens(self, row: int) -> tuple[int, ...]:
        """New tokens of a row so far, the stop token included."""
        return tuple(self._generated[row, : self._counts[row]].tolist())

    def generated(self, row: int) -> Generated:
        """What followed a prompt so far."""
        finish: Finish = "length"
        if self._ended[row]:
            finish = "interrupted"
        elif self._done[row]:
            finish = "stop"
        log_probs = self.state.log_probs
        if log_probs is not None:
            own = np.asarray(log_probs)[row, : self._counts[row]]
            return Generated(
                tokens=self.tokens(row), finish=finish, log_probs=tuple(map(float, own))
            )
        return Generated(tokens=self.tokens(row), finish=finish)

    def cached(self, prompt: Sequence[int]) -> Cached:
        """What the session of this one prompt leaves; the session is of no use after it."""
        held = int(self.state.lengths[0])
        return Cached(tokens=(*prompt, *self.tokens(0))[:held], cache=self.state.cache)

    @property
    def stats(self) -> Stats:
        """Of what was done so far."""
        new = int(self._counts.sum())
        seconds = self._seconds
        return Stats(
            prompt_tokens=sum(row.size for row in self.batch.rows),
            new_tokens=new,
            prefill_seconds=seconds["prefill"],
            first_token_seconds=seconds["prefill"] + seconds["first"],
            decode_seconds=seconds["decode"],
            compile_seconds=self._compile_seconds() - self._compiled_before,
            decoded=new - self._first_count,
        )

    def _compile_seconds(self) -> float:
        return self.prefill.compile_seconds + self.decode.compile_seconds

    def _clock(self) -> float:
        """Seconds that were not spent compiling."""
        return time.perf_counter() - self._compile_seconds()


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
