"""Perplexity and task accuracy."""

from fabric_jax.evaluation.accuracy import AnswerBy, TaskAccuracy, make_accuracy_task
from fabric_jax.evaluation.classification import Classification
from fabric_jax.evaluation.compare import Comparison, Evaluation, compare
from fabric_jax.evaluation.divergence import Divergence, Run, measure_divergence
from fabric_jax.evaluation.perplexity import Perplexity, evaluate_perplexity

__all__ = [
    "AnswerBy",
    "Classification",
    "Comparison",
    "Divergence",
    "Evaluation",
    "Perplexity",
    "Run",
    "TaskAccuracy",
    "compare",
    "evaluate_perplexity",
    "make_accuracy_task",
    "measure_divergence",
]
