"""Log-probabilities of given continuations."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int32
from numpy.typing import NDArray

from fabric_jax.generation.generator import bucket, filled_rows, pad_right
from fabric_jax.models.decoder import DecoderDefinition
from fabric_jax.models.initialize import Tree
from fabric_jax.parallel.placement import ROWS, WHOLE, base_specs, shape_of

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context (at least one) and of a continuation."""

Scorer = Callable[[Tree, Tree, Sequence[Pair], int], NDArray[np.float64]]


def make_scorer(definition: DecoderDefinition, mesh: Mesh | None = None) -> Scorer:
    """``(base, adapter, pairs, batch_size) -> log p(continuation | context)``, float64 [pairs].

    The sum of the tokens' log-probabilities, nats; the tokens' own are float32. With a ``mesh`` of
    several devices the base is cut along it, and a batch is filled up to what they divide.
    """
    token_scores = _make_token_scores(definition, mesh)

    def score(
        base: Tree, adapter: Tree, pairs: Sequence[Pair], batch_size: int
    ) -> NDArray[np.float64]:
        width = max((len(rest) for _, rest in pairs), default=1)
        sums = np.zeros(len(pairs))
        size = filled_rows(batch_size, mesh)
        by_length = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        for start in range(0, len(pairs), batch_size):
            members = by_length[start : start + batch_size]
            chosen = [pairs[i] for i in members]
            longest = max(len(context) + len(rest) for context, rest in chosen) - 1
            rows = [np.asarray([*context, *rest[:-1]], np.int64) for context, rest in chosen]
            rests = [np.asarray(rest, np.int64) for _, rest in chosen]
            tokens, _ = pad_right(rows, size, bucket(longest, definition.config.max_length))
            targets, counts = pad_right(rests, size, width)
            starts = np.zeros(size, np.int32)
            starts[: len(chosen)] = [len(context) - 1 for context, _ in chosen]
            scores = np.asarray(token_scores(base, adapter, tokens, starts, targets), np.float64)
            inside = np.arange(width) < counts[:, None]
            sums[members] = np.where(inside, scores, 0).sum(1)[: len(chosen)]
        return sums

    return score


def _make_token_scores(
    definition: DecoderDefinition, mesh: Mesh | None
) -> Callable[[Tree, Tree, NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]], jax.Array]:
    own = definition if mesh is None else definition.on_mesh(shape_of(mesh))

    def token_scores(
        base: Tree,
        adapter: Tree,
        tokens: Int32[Array, "B T"],
        starts: Int32[Array, "B"],
        targets: Int32[Array, "B C"],
    ) -> Float32[Array, "B C"]:
        """Log-probabilities of ``targets``, the first predicted at position ``starts``."""
        decoder = own.bind(base, adapter)
        row = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        hidden = decoder(tokens, jnp.broadcast_to(row, tokens.shape), jnp.ones_like(tokens))
        # The head is applied only where a target is predicted: all logits would be [B, T, V].
        where = starts[:, None] + jnp.arange(targets.shape[1], dtype=jnp.int32)[None, :]
        where = jnp.minimum(where, tokens.shape[1] - 1)
        hidden = jnp.take_along_axis(hidden, where[:, :, None], axis=1)
        scores = jax.nn.log_softmax(decoder.logits(hidden), axis=-1)
        return jnp.take_along_axis(scores, targets[:, :, None], axis=-1)[:, :, 0]

    if mesh is None:
        return jax.jit(token_scores)

    @jax.jit
    def over_devices(base: Tree, adapter: Tree, *rows: jax.Array) -> jax.Array:
        ternary = definition.options.mode != "float"
        specs = base_specs(base, shape_of(mesh), ternary=ternary)
        return jax.shard_map(
            token_scores,
            mesh=mesh,
            in_specs=(specs, WHOLE, ROWS, ROWS, ROWS),
            out_specs=ROWS,
            check_vma=False,
        )(base, adapter, *rows)

    return over_devices
