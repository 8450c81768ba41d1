"""Mean next-token loss and perplexity over batches."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from fabric_jax.data.batch import Batch
from fabric_jax.errors import FabricError
from fabric_jax.models.decoder import DecoderDefinition
from fabric_jax.models.initialize import Tree
from fabric_jax.parallel.mesh import DATA, FSDP
from fabric_jax.parallel.placement import ROWS, WHOLE, base_specs, own_rows, place_rows, shape_of

EvalStep = Callable[[Tree, Tree, Batch], tuple[jax.Array, jax.Array]]
"""``(base, adapter, batch[B, T]) -> (sum of losses in nats, number of trainable tokens)``."""


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Loss over all trainable targets, each with the same weight.

    Attributes:
        loss: mean negative log-likelihood, nats a token.
        tokens: targets it is the mean of.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """``exp(loss)``; infinite where that overflows."""
        with np.errstate(over="ignore"):
            return float(np.exp(np.float64(self.loss)))


def make_eval_step(definition: DecoderDefinition, mesh: Mesh | None = None) -> EvalStep:
    """The compiled step of an evaluation.

    With a mesh of several devices the base is cut along it, and batches are given as the host has
    them: this process's rows.
    """
    if mesh is not None:
        definition = definition.on_mesh(shape_of(mesh))

    def step(base: Tree, adapter: Tree, batch: Batch) -> tuple[jax.Array, jax.Array]:
        decoder = definition.bind(base, adapter)
        hidden = decoder(batch.tokens, batch.positions, batch.segment_ids)
        loss = decoder.loss(hidden, batch.targets, batch.loss_mask)
        return loss, jnp.sum(batch.loss_mask)

    return jax.jit(step) if mesh is None else _over_devices(step, definition, mesh)


def _over_devices(step: EvalStep, definition: DecoderDefinition, mesh: Mesh) -> EvalStep:
    """``step`` on every device's rows and parts of the base; its results summed over rows."""
    shape = shape_of(mesh)

    @jax.jit
    def summed(base: Tree, adapter: Tree, batch: Batch) -> tuple[jax.Array, jax.Array]:
        ternary = definition.options.mode != "float"
        return jax.shard_map(
            lambda *own: lax.psum(step(*own), (DATA, FSDP)),
            mesh=mesh,
            in_specs=(base_specs(base, shape, ternary=ternary), WHOLE, ROWS),
            out_specs=(WHOLE, WHOLE),
            check_vma=False,
        )(base, adapter, batch)

    def on_rows(base: Tree, adapter: Tree, batch: Batch) -> tuple[jax.Array, jax.Array]:
        first, last = own_rows(shape.row_shards, mesh)
        rows = batch.tokens.shape[0] * shape.row_shards // (last - first)
        return summed(base, adapter, place_rows(batch, rows, mesh, ROWS))

    return on_rows


def evaluate_perplexity(
    step: EvalStep, base: Tree, adapter: Tree, batches: Iterable[Batch]
) -> Perplexity:
    """The perplexity of a model on batches [B, T].

    Raises:
        FabricError: the batches hold no trainable token.
    """
    return evaluate_perplexities(step, base, [adapter], batches)[0]


def evaluate_perplexities(
    step: EvalStep, base: Tree, adapters: Sequence[Tree], batches: Iterable[Batch]
) -> list[Perplexity]:
    """The perplexity under each adapter, in one pass over the batches.

    Sums of a batch are float32, sums of batches float64, so the result does not drift with their
    number. One batch is always ahead on the device.
    """
    losses, tokens = np.zeros(len(adapters)), np.zeros(len(adapters))
    waiting: list[tuple[jax.Array, jax.Array]] = []

    def collect() -> None:
        for i, (loss, count) in enumerate(waiting):
            losses[i] += float(loss)
            tokens[i] += float(count)

    for batch in batches:
        running = [step(base, adapter, batch) for adapter in adapters]
        collect()
        waiting = running
    collect()
    if adapters and not tokens[0]:
        raise FabricError(
            "no trainable token to evaluate on", fix="Check the evaluation rows and their masks"
        )
    return [
        Perplexity(loss=float(loss / count), tokens=int(count))
        for loss, count in zip(losses, tokens, strict=True)
    ]
