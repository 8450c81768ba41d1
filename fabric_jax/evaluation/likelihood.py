"""Log-probabilities of given continuations."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32
from numpy.typing import NDArray

from fabric_jax.generation.generator import bucket, pad_right
from fabric_jax.models.decoder import DecoderDefinition
from fabric_jax.models.initialize import Tree

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context (at least one) and of a continuation."""

Scorer = Callable[[Tree, Tree, Sequence[Pair], int], NDArray[np.float64]]


def make_scorer(definition: DecoderDefinition) -> Scorer:
    """``(base, adapter, pairs, batch_size) -> log p(continuation | context)``, float64 [pairs].

    The sum of the tokens' log-probabilities, nats; the tokens' own are float32.
    """
    max_length = definition.config.max_length

    @jax.jit
    def token_scores(
        base: Tree,
        adapter: Tree,
        tokens: Int32[Array, "B T"],
        starts: Int32[Array, "B"],
        targets: Int32[Array, "B C"],
    ) -> Float32[Array, "B C"]:
        """Log-probabilities of ``targets``, the first predicted at position ``starts``."""
        decoder = definition.bind(base, adapter)
        positions = jnp.broadcast_to(
            jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape
        )
        hidden = decoder(tokens, positions, jnp.ones_like(tokens))
        # The head is applied only where a target is predicted: all logits would be [B, T, V].
        where = starts[:, None] + jnp.arange(targets.shape[1], dtype=jnp.int32)[None, :]
        where = jnp.minimum(where, tokens.shape[1] - 1)
        hidden = jnp.take_along_axis(hidden, where[:, :, None], axis=1)
        scores = jax.nn.log_softmax(decoder.logits(hidden), axis=-1)
        return jnp.take_along_axis(scores, targets[:, :, None], axis=-1)[:, :, 0]

    def score(
        base: Tree, adapter: Tree, pairs: Sequence[Pair], batch_size: int
    ) -> NDArray[np.float64]:
        rows = [np.asarray([*context, *rest[:-1]], np.int64) for context, rest in pairs]
        rests = [np.asarray(rest, np.int64) for _, rest in pairs]
        width = max((rest.size for rest in rests), default=1)
        sums = np.zeros(len(pairs))
        by_length = sorted(range(len(rows)), key=lambda i: -rows[i].size)
        for start in range(0, len(rows), batch_size):
            members = by_length[start : start + batch_size]
            longest = bucket(rows[members[0]].size, max_length)
            tokens, _ = pad_right([rows[i] for i in members], batch_size, longest)
            targets, counts = pad_right([rests[i] for i in members], batch_size, width)
            starts = np.zeros(batch_size, np.int32)
            starts[: len(members)] = [len(pairs[i][0]) - 1 for i in members]
            scores = np.asarray(
                token_scores(
                    base, adapter, jnp.asarray(tokens), jnp.asarray(starts), jnp.asarray(targets)
                ),
                np.float64,
            )
            inside = np.arange(width) < counts[:, None]
            sums[members] = np.where(inside, scores, 0).sum(1)[: len(members)]
        return sums

    return score
