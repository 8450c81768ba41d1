"""How far apart two models are, token by token: two implementations, formats or adapters."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32
from numpy.typing import NDArray

from fabric_jax.data.batch import Batch
from fabric_jax.errors import FabricError
from fabric_jax.models.decoder import DecoderDefinition
from fabric_jax.models.initialize import Tree

BLOCK = 32
"""Positions whose logits exist at once in float64."""


class Run(NamedTuple):
    """A model with its weights."""

    definition: DecoderDefinition
    base: Tree
    adapter: Tree


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Two models on the same tokens.

    Divergences are KL(first || second) of the next-token distributions, in nats, from float32
    logits in float64.

    Attributes:
        positions: next tokens predicted.
        kl_mean: over positions, as the next three.
        kl_median: half are below.
        kl_p99: 99 of 100 are below.
        kl_max: the largest.
        top1_agreement: share of positions with the same most likely token.
        disagreements: positions where it is another one.
        perplexity_first: on the text.
        perplexity_second: likewise.
    """

    positions: int
    kl_mean: float
    kl_median: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    disagreements: int
    perplexity_first: float
    perplexity_second: float

    @property
    def perplexity_ratio(self) -> float:
        """Of the second to the first."""
        return self.perplexity_second / self.perplexity_first

    def to_dict(self) -> dict[str, Any]:
        """Field names and values, and the ratio."""
        return {**asdict(self), "perplexity_ratio": self.perplexity_ratio}


def measure_divergence(first: Run, second: Run, batches: Iterable[Batch]) -> Divergence:
    """Compares two models on the trainable targets of batches [B, T].

    Raises:
        FabricError: the vocabularies differ in size, or there is no trainable token.
    """
    sizes = [run.definition.config.vocab_size for run in (first, second)]
    if sizes[0] != sizes[1]:
        raise FabricError(
            "models with different vocabularies can't be compared",
            expected=f"{sizes[0]} tokens",
            found=str(sizes[1]),
        )
    hiddens = [make_hidden(run) for run in (first, second)]
    heads = [make_logits(run) for run in (first, second)]
    kl: list[NDArray[np.float64]] = []
    same: list[NDArray[np.bool_]] = []
    losses: list[NDArray[np.float64]] = []
    for batch in batches:
        states = [hidden(batch) for hidden in hiddens]
        targets = np.asarray(batch.targets).reshape(-1)
        for members in _blocks(np.flatnonzero(np.asarray(batch.loss_mask).reshape(-1))):
            p, q = (
                log_softmax(head(state[_filled(members)])[: len(members)])
                for head, state in zip(heads, states, strict=True)
            )
            kl.append(np.sum(np.exp(p) * (p - q), axis=-1))
            same.append(p.argmax(-1) == q.argmax(-1))
            where = np.arange(len(members))
            losses.append(-np.stack([x[where, targets[members]] for x in (p, q)]))
    if not kl:
        raise FabricError(
            "no trainable token to evaluate on", fix="Check the evaluation rows and their masks"
        )
    return _summary(np.concatenate(kl), np.concatenate(same), np.concatenate(losses, axis=1))


def make_hidden(run: Run) -> Callable[[Batch], jax.Array]:
    """``batch [B, T] -> final hidden states [B·T, D]``, compiled."""

    @jax.jit
    def hidden(base: Tree, adapter: Tree, batch: Batch) -> jax.Array:
        decoder = run.definition.bind(base, adapter)
        states = decoder(batch.tokens, batch.positions, batch.segment_ids)
        return states.reshape(-1, states.shape[-1])

    return lambda batch: hidden(run.base, run.adapter, batch)


def make_logits(run: Run) -> Callable[[jax.Array], Float32[Array, "B V"]]:
    """``hidden [B, D] -> logits [B, V]``, compiled."""

    @jax.jit
    def logits(base: Tree, adapter: Tree, hidden: jax.Array) -> jax.Array:
        return run.definition.bind(base, adapter).logits(hidden)

    return lambda hidden: logits(run.base, run.adapter, hidden)


def log_softmax(logits: jax.Array) -> NDArray[np.float64]:
    """Float64 log-probabilities of float32 logits [B, V]."""
    values = np.asarray(logits, np.float64)
    values -= values.max(-1, keepdims=True)
    return values - np.log(np.exp(values).sum(-1, keepdims=True))


def _blocks(members: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(members), BLOCK):
        yield members[start : start + BLOCK]


def _filled(members: NDArray[np.int64]) -> jax.Array:
    """A whole block, so that one program serves all: the last member is repeated."""
    return jnp.asarray(np.pad(members, (0, BLOCK - len(members)), mode="edge"))


def _summary(
    kl: NDArray[np.float64], same: NDArray[np.bool_], losses: NDArray[np.float64]
) -> Divergence:
    """From values per position; ``losses`` [2, positions]."""
    with np.errstate(over="ignore"):
        first, second = np.exp(losses.mean(axis=1))
    return Divergence(
        positions=len(kl),
        kl_mean=float(kl.mean()),
        kl_median=float(np.median(kl)),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_max=float(kl.max()),
        top1_agreement=float(same.mean()),
        disagreements=int((~same).sum()),
        perplexity_first=float(first),
        perplexity_second=float(second),
    )
