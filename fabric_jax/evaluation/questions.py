"""Labelled rows as token ids: what the model reads, and what each class would add."""

from collections.abc import Sequence
from dataclasses import dataclass

from fabric_jax.data.tokenize_rows import LabelledRow
from fabric_jax.data.tokenizer import Tokenizer
from fabric_jax.errors import FabricError


@dataclass(frozen=True, kw_only=True)
class TokenizedQuestion:
    """One row to be answered.

    Attributes:
        context: token ids of the prompt.
        continuations: token ids that follow ``context`` for each class.
        gold: the right class.
    """

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    gold: str


def class_names(rows: Sequence[LabelledRow]) -> tuple[str, ...]:
    """The classes of the rows, sorted.

    Raises:
        FabricError: there are no rows, fewer than two classes, or a label is empty.
    """
    labels = tuple(sorted({row.label for row in rows}))
    if "" in labels:
        raise FabricError("a labelled row has an empty label", expected="the name of a class")
    if len(labels) < 2:
        raise FabricError(
            "task accuracy needs rows of two classes or more",
            expected='rows with a "label" and an answer',
            found=f"{len(rows)} labelled rows of {len(labels)} classes",
        )
    return labels


def make_questions(
    rows: Sequence[LabelledRow], labels: Sequence[str], tokenizer: Tokenizer, max_length: int
) -> list[TokenizedQuestion]:
    """Tokenises the rows with each class as the answer.

    Prompt and answer are tokenised together, as they are in training, and split where all the
    answers and the prompt alone agree: a vocabulary may join the end of a prompt (a space, mostly)
    with the start of an answer.

    Raises:
        FabricError: a row with its longest answer exceeds ``max_length`` tokens, or has no prompt.
    """
    questions: list[TokenizedQuestion] = []
    for i, row in enumerate(rows):
        plain = tokenizer.encode(row.prompt)
        special = list(row.prompt_ids[: len(row.prompt_ids) - len(plain)])
        # A prompt without any answer in its row tells no separator; words follow a colon's space.
        separator = row.separator or (" " if row.prompt.endswith(":") else "")
        wholes = [special + tokenizer.encode(row.prompt + separator + label) for label in labels]
        agreed = common_prefix([list(row.prompt_ids), *wholes])
        if agreed == 0:
            raise FabricError(
                f"labelled row {i} has nothing before its answer", expected="a question"
            )
        longest = max(len(whole) for whole in wholes)
        if longest > max_length:
            raise FabricError(
                f"labelled row {i} with its answer is longer than the model allows",
                expected=f"at most {max_length} tokens",
                found=str(longest),
                fix="Shorten or drop the row",
            )
        questions.append(
            TokenizedQuestion(
                context=tuple(wholes[0][:agreed]),
                continuations=tuple(tuple(whole[agreed:]) for whole in wholes),
                gold=row.label,
            )
        )
    return questions


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all sequences share."""
    length = 0
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return length
