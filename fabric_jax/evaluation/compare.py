"""A model with and without its adapter, side by side."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fabric_jax.data.batch import Batch
from fabric_jax.data.tokenize_rows import LabelledRow
from fabric_jax.data.tokenizer import Tokenizer
from fabric_jax.evaluation.accuracy import (
    AccuracyTask,
    AnswerBy,
    TaskAccuracy,
    make_accuracy_task,
)
from fabric_jax.evaluation.perplexity import Perplexity, evaluate_perplexities, make_eval_step
from fabric_jax.models.decoder import DecoderDefinition
from fabric_jax.models.initialize import Tree


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured of one model; None where there was nothing to measure it on."""

    perplexity: Perplexity | None
    accuracy: TaskAccuracy | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The base model and, where there is an adapter, the adapted one, on the same rows."""

    base: Evaluation
    adapter: Evaluation | None


def compare(
    definition: DecoderDefinition,
    base: Tree,
    adapter: Tree,
    *,
    tokenizer: Tokenizer,
    batches: Iterable[Batch] | None = None,
    labelled: Sequence[LabelledRow] = (),
    by: AnswerBy = "generation",
    batch_size: int = 8,
    mesh: Mesh | None = None,
) -> Comparison:
    """Measures perplexity on ``batches`` [B, T] and task accuracy on ``labelled``.

    The base is the same compiled program with an adapter of zeros, so nothing but the adapter
    differs. An empty ``adapter`` measures the base alone. With a ``mesh`` of several devices the
    trees lie there, ``base`` cut along it.

    Raises:
        FabricError: as ``evaluate_perplexity`` and ``make_accuracy_task``.
    """
    adapters = [jax.tree.map(jnp.zeros_like, adapter), adapter] if adapter else [adapter]
    task: AccuracyTask | None = None
    if labelled:  # First, since it may be refused.
        task = make_accuracy_task(
            definition, tokenizer, labelled, by=by, batch_size=batch_size, mesh=mesh
        )
    perplexities: list[Perplexity] | list[None] = [None] * len(adapters)
    if batches is not None:
        step = make_eval_step(definition, mesh)
        perplexities = evaluate_perplexities(step, base, adapters, batches)
    accuracies: list[TaskAccuracy] | list[None] = [None] * len(adapters)
    if task is not None:
        accuracies = [task(base, tree) for tree in adapters]
    evaluations = [
        Evaluation(perplexity=perplexity, accuracy=accuracy)
        for perplexity, accuracy in zip(perplexities, accuracies, strict=True)
    ]
    return Comparison(base=evaluations[0], adapter=evaluations[1] if adapter else None)
