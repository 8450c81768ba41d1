"""From logits to the next token."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from fabric_jax.generation.config import GenerationConfig

Method = Literal["greedy", "temperature", "filtered"]
"""What is compiled: the most likely token, a draw from all, a draw from the top k or top p (which
alone needs the vocabulary sorted)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The numbers of a draw, arguments of the compiled program so that none is compiled in."""

    temperature: Float32[Array, ""]
    top_k: Int32[Array, ""]
    top_p: Float32[Array, ""]


def sampling_of(config: GenerationConfig) -> tuple[Method, Sampling]:
    """The method and numbers that ``config`` asks for."""
    method: Method = "temperature"
    if config.temperature == 0 or config.top_k == 1:
        method = "greedy"
    elif config.top_k or config.top_p < 1:
        method = "filtered"
    return method, Sampling(
        temperature=jnp.float32(config.temperature),
        top_k=jnp.int32(config.top_k),
        top_p=jnp.float32(config.top_p),
    )


def choose_tokens(
    logits: Float32[Array, "B V"], keys: jax.Array, sampling: Sampling, method: Method
) -> Int32[Array, "B"]:
    """One token a row; ``keys`` [B] are the rows' random keys for this token."""
    match method:
        case "greedy":
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        case "temperature":
            draws = jax.vmap(jax.random.categorical)(keys, logits / sampling.temperature)
            return draws.astype(jnp.int32)
        case "filtered":
            scores, order = filtered_scores(logits, sampling)
            ranks = jax.vmap(jax.random.categorical)(keys, scores)
            return jnp.take_along_axis(order, ranks[:, None], axis=-1)[:, 0]


def filtered_scores(
    logits: Float32[Array, "B V"], sampling: Sampling
) -> tuple[Float32[Array, "B V"], Int32[Array, "B V"]]:
    """Scaled logits from the most likely token down, -inf where left out, and the tokens' ids.

    Temperature, then top k, then top p among what is left. Equal logits rank by id.
    """
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True).astype(jnp.int32)
    scores = jnp.take_along_axis(logits, order, axis=-1) / sampling.temperature
    rank = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, :]
    keep = (rank < sampling.top_k) | (sampling.top_k == 0)
    scores = jnp.where(keep, scores, -jnp.inf)
    probabilities = jax.nn.softmax(scores, axis=-1)
    likelier = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The most likely token stays whatever rounding does to the sums.
    keep = (likelier < sampling.top_p) | (sampling.top_p >= 1) | (rank == 0)
    return jnp.where(keep, scores, -jnp.inf), order
