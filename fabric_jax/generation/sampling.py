"""From logits to the next token."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from fabric_jax.generation.config import GenerationConfig

Method = Literal["greedy", "temperature", "filtered"]
"""What is compiled: the most likely token, a draw from all, a draw from those that ``top_k``,
``top_p`` and ``min_p`` leave."""
LEAST_TEMPERATURE = 1e-30
"""What lies below it would divide logits to infinity; the largest is all that is drawn by then."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The numbers of a draw, arguments of the compiled program so that none is compiled in."""

    temperature: Float32[Array, ""]
    top_k: Int32[Array, ""]
    top_p: Float32[Array, ""]
    min_p: Float32[Array, ""]
    repetition_penalty: Float32[Array, ""]


def sampling_of(config: GenerationConfig) -> tuple[Method, Sampling]:
    """The method and numbers that ``config`` asks for."""
    method: Method = "temperature"
    if config.temperature == 0 or config.top_k == 1:
        method = "greedy"
    elif config.top_k or config.top_p < 1 or config.min_p:
        method = "filtered"
    return method, Sampling(
        temperature=jnp.float32(max(config.temperature, LEAST_TEMPERATURE)),
        top_k=jnp.int32(config.top_k),
        top_p=jnp.float32(config.top_p),
        min_p=jnp.float32(config.min_p),
        repetition_penalty=jnp.float32(config.repetition_penalty),
    )


def choose_tokens(
    logits: Float32[Array, "B V"], keys: jax.Array, sampling: Sampling, method: Method
) -> Int32[Array, "B"]:
    """One token a row; ``keys`` [B] are the rows' random keys for this token."""
    match method:
        case "greedy":
            return most_likely(logits)
        case "temperature":
            scores = logits / sampling.temperature
        case "filtered":
            scores = filtered_scores(logits, sampling)
    return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)


def most_likely(logits: Float32[Array, "B V"]) -> Int32[Array, "B"]:
    """The first of the largest of each row, as ``argmax`` has it, in a third of its time on CPU."""

    def argmax(x: jax.Array) -> jax.Array:
        return jnp.argmax(x, axis=-1).astype(jnp.int32)

    def two_passes(x: jax.Array) -> jax.Array:
        # XLA's reduction of pairs runs number by number there; these two are vectorised.
        last = x.shape[-1] - 1
        ids = lax.broadcasted_iota(jnp.int32, x.shape, 1)
        found = (x == jnp.max(x, axis=-1, keepdims=True)) | jnp.isnan(x)
        return jnp.min(jnp.where(found, ids, last), axis=-1)

    return lax.platform_dependent(logits, cpu=two_passes, default=argmax)


def penalize(
    logits: Float32[Array, "B V"], seen: Bool[Array, "B V"], sampling: Sampling
) -> Float32[Array, "B V"]:
    """Logits after the repetition penalty on tokens that were ``seen``."""
    penalty = sampling.repetition_penalty
    penalized = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(seen, penalized, logits)


def token_log_probs(
    logits: Float32[Array, "B V"], tokens: Int32[Array, "B"]
) -> Float32[Array, "B"]:
    """The model's own log-probabilities of ``tokens``: no temperature, no filter, no penalty."""
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def filtered_scores(logits: Float32[Array, "B V"], sampling: Sampling) -> Float32[Array, "B V"]:
    """Scaled logits, -inf where left out.

    Temperature, then top k, then top p among what is left, then min p. Equal logits rank by id.
    Nothing is sorted: both thresholds are found a bit at a time, which takes 32 sums over the
    vocabulary each.
    """
    scores = logits / sampling.temperature
    order = _ordered(scores)
    ones = jnp.ones_like(scores)
    kth = _threshold(order, ones, sampling.top_k.astype(jnp.float32))
    tied = order == kth[:, None]
    above = jnp.sum(order > kth[:, None], axis=-1, dtype=jnp.int32)[:, None]
    # A tie's rank among its equals, from 1.
    rank = jnp.cumsum(tied, axis=-1, dtype=jnp.int32)
    keep = (order > kth[:, None]) | (tied & (above + rank <= sampling.top_k))
    scores = jnp.where(keep | (sampling.top_k == 0), scores, -jnp.inf)
    probabilities = jax.nn.softmax(scores, axis=-1)
    scores = jnp.where(_nucleus(order, probabilities, sampling.top_p), scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    return jnp.where(scores - top >= jnp.log(sampling.min_p), scores, -jnp.inf)


def _nucleus(
    order: UInt32[Array, "B V"], probabilities: Float32[Array, "B V"], top_p: Float32[Array, ""]
) -> Bool[Array, "B V"]:
    """The tokens before which less than ``top_p`` has been gathered, from the most likely down."""
    at = _threshold(order, probabilities, top_p)[:, None]
    tied, above = order == at, order > at
    before = jnp.cumsum(tied, axis=-1, dtype=jnp.float32) - tied.astype(jnp.float32)
    gathered = jnp.sum(jnp.where(above, probabilities, 0), axis=-1, keepdims=True)
    gathered = gathered + before * probabilities
    # The most likely token stays whatever rounding does to the sums.
    likeliest = jnp.arange(order.shape[-1])[None] == jnp.argmax(order, axis=-1)[:, None]
    return above | (tied & (gathered < top_p)) | likeliest | (top_p >= 1)


def _threshold(
    order: UInt32[Array, "B V"], weights: Float32[Array, "B V"], least: Float32[Array, ""]
) -> UInt32[Array, "B"]:
    """The largest t for which the tokens of ``order >= t`` weigh ``least`` together."""

    def add_bit(i: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        weight = jnp.sum(jnp.where(order >= candidate[:, None], weights, 0), axis=-1)
        return jnp.where(weight >= least, candidate, found)

    return lax.fori_loop(0, 32, add_bit, jnp.zeros(order.shape[0], jnp.uint32))


def _ordered(scores: Float32[Array, "B V"]) -> UInt32[Array, "B V"]:
    """Integers in the order of the floats: negative ones have their bits turned."""
    bits = lax.bitcast_convert_type(scores + jnp.float32(0), jnp.int32)
    signed = bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))
    return lax.bitcast_convert_type(signed, jnp.uint32) ^ jnp.uint32(1 << 31)
