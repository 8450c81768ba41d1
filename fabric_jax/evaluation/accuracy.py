"""Task accuracy: does the model answer labelled rows with their class?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jax.sharding import Mesh

from fabric_jax.data.tokenize_rows import LabelledRow
from fabric_jax.data.tokenizer import Tokenizer
from fabric_jax.errors import FabricError, unknown_name
from fabric_jax.evaluation.classification import Classification, classify, first_word
from fabric_jax.evaluation.likelihood import Scorer, make_scorer
from fabric_jax.evaluation.questions import TokenizedQuestion, class_names, make_questions
from fabric_jax.generation.config import GenerationConfig
from fabric_jax.generation.generator import Generator, make_generator
from fabric_jax.generation.prompts import decode_continuation
from fabric_jax.models.decoder import DecoderDefinition
from fabric_jax.models.initialize import Tree

AnswerBy = Literal["generation", "likelihood", "likelihood_per_token"]
"""``generation``: the first word of the greedy answer. ``likelihood``: the class whose text is most
probable after the prompt. ``likelihood_per_token``: the same by the mean log-probability of its
tokens, which does not favour short names."""

# Room for what may stand before the first word (white space, quotes, asterisks), and for the end of
# the word to show.
EXTRA_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class TaskAccuracy:
    """Scores and the answers behind them.

    Attributes:
        scores: accuracy, macro-F1, format rate, confusion.
        by: how answers were taken from the model.
        predictions: the class answered to each row, None where the answer is no class.
        answers: the generated text of each row; empty unless ``by`` is ``generation``.
    """

    scores: Classification
    by: AnswerBy
    predictions: tuple[str | None, ...]
    answers: tuple[str, ...] = ()


AccuracyTask = Callable[[Tree, Tree], TaskAccuracy]


def make_accuracy_task(
    definition: DecoderDefinition,
    tokenizer: Tokenizer,
    rows: Sequence[LabelledRow],
    *,
    by: AnswerBy = "generation",
    batch_size: int = 8,
    mesh: Mesh | None = None,
) -> AccuracyTask:
    """``(base, adapter) -> TaskAccuracy`` on these rows; tokenises and compiles once.

    Classes are those that occur in the rows. On the devices of a ``mesh`` the trees lie there, the
    base cut along it.

    Raises:
        FabricError: no labelled rows, fewer than two classes, a row too long for the model, an
            unknown ``by``, or class names that their first word doesn't tell apart.
    """
    if by not in get_args(AnswerBy):
        raise unknown_name("way to answer", by, get_args(AnswerBy))
    if batch_size < 1:
        raise FabricError("batch_size is too small", expected="1 or more", found=str(batch_size))
    labels = class_names(rows)
    questions = make_questions(rows, labels, tokenizer, definition.config.max_length)
    size = min(batch_size, len(questions))
    if by == "generation":
        generator = make_generator(definition, mesh)
        return _by_generation(generator, tokenizer, questions, _first_words(labels), size)
    return _by_likelihood(make_scorer(definition, mesh), questions, labels, by, size)


def _by_generation(
    generator: Generator,
    tokenizer: Tokenizer,
    questions: Sequence[TokenizedQuestion],
    words: dict[str, str],
    batch_size: int,
) -> AccuracyTask:
    contexts = [question.context for question in questions]
    needed = max(len(rest) for question in questions for rest in question.continuations)
    room = generator.config.max_length - max(map(len, contexts))
    settings = GenerationConfig(
        max_new_tokens=min(needed + EXTRA_TOKENS, room),
        stop_tokens=tokenizer.stop_ids,
        batch_size=batch_size,
    )

    def evaluate(base: Tree, adapter: Tree) -> TaskAccuracy:
        results = generator(base, adapter, contexts, settings)
        answers = tuple(
            decode_continuation(tokenizer, context, result.answer)
            for context, result in zip(contexts, results, strict=True)
        )
        predictions = tuple(words.get(first_word(answer)) for answer in answers)
        return _result(questions, "generation", predictions, answers)

    return evaluate


def _by_likelihood(
    score: Scorer,
    questions: Sequence[TokenizedQuestion],
    labels: tuple[str, ...],
    by: AnswerBy,
    batch_size: int,
) -> AccuracyTask:
    pairs = [(question.context, rest) for question in questions for rest in question.continuations]
    lengths = np.asarray([len(rest) for _, rest in pairs]).reshape(len(questions), -1)

    def evaluate(base: Tree, adapter: Tree) -> TaskAccuracy:
        scores = score(base, adapter, pairs, batch_size).reshape(lengths.shape)
        if by == "likelihood_per_token":
            scores = scores / lengths
        predictions = tuple(labels[i] for i in scores.argmax(1))
        return _result(questions, by, predictions)

    return evaluate


def _result(
    questions: Sequence[TokenizedQuestion],
    by: AnswerBy,
    predictions: tuple[str | None, ...],
    answers: tuple[str, ...] = (),
) -> TaskAccuracy:
    scores = classify([question.gold for question in questions], predictions)
    return TaskAccuracy(scores=scores, by=by, predictions=predictions, answers=answers)


def _first_words(labels: Sequence[str]) -> dict[str, str]:
    """The class that each first word stands for."""
    words = {first_word(label): label for label in labels}
    if len(words) < len(labels) or "" in words:
        raise FabricError(
            "the first word of an answer does not tell these classes apart",
            found=", ".join(repr(label) for label in labels),
            fix="Choose by likelihood, or rename the labels",
        )
    return words
