"""Scores of a classifier that may also answer outside the classes. Numpy only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Counts of right and wrong answers.

    Attributes:
        labels: the C classes.
        confusion: int64 [C, C + 1]: rows are true classes, columns answers, the last column those
            that are no class at all. They are wrong, and count against the format rate.
    """

    labels: tuple[str, ...]
    confusion: NDArray[np.int64]

    @property
    def total(self) -> int:
        """Answers in all."""
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        """Right answers."""
        return int(np.trace(self.confusion))

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy."""
        return wilson_interval(self.correct, self.total)

    @property
    def format_rate(self) -> float:
        """Share of answers that are one of the classes, right or not."""
        return 1 - int(self.confusion[:, -1].sum()) / self.total

    @property
    def support(self) -> dict[str, int]:
        """Rows of each true class."""
        return dict(zip(self.labels, self.confusion.sum(1).tolist(), strict=True))

    @property
    def f1(self) -> dict[str, float]:
        """F1 of each class, 0 for one that neither occurs nor is answered."""
        hits = np.diag(self.confusion)
        either = self.confusion.sum(1) + self.confusion[:, :-1].sum(0)
        scores = 2 * hits / np.maximum(either, 1)
        return dict(zip(self.labels, scores.tolist(), strict=True))

    @property
    def macro_f1(self) -> float:
        """Mean of the classes' F1, each class weighing the same."""
        return float(np.mean(list(self.f1.values())))

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        low, high = self.interval
        return {
            "accuracy": self.accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "macro_f1": self.macro_f1,
            "format_rate": self.format_rate,
            "correct": self.correct,
            "total": self.total,
            "labels": list(self.labels),
            "support": self.support,
            "f1": self.f1,
            "confusion": self.confusion.tolist(),
        }


def classify(gold: Sequence[str], predicted: Sequence[str | None]) -> Classification:
    """Counts answers against the truth; the classes are those of ``gold``.

    Args:
        gold: the true class of each row, at least one row.
        predicted: the answer to each row, None or an unknown name where it is no class.
    """
    labels = tuple(sorted(set(gold)))
    index = {label: i for i, label in enumerate(labels)}
    confusion = np.zeros((len(labels), len(labels) + 1), np.int64)
    for truth, answer in zip(gold, predicted, strict=True):
        column = len(labels) if answer is None else index.get(answer, len(labels))
        confusion[index[truth], column] += 1
    return Classification(labels=labels, confusion=confusion)


def wilson_interval(
    successes: int, trials: int, *, confidence: float = 0.95
) -> tuple[float, float]:
    """The proportions p that a score test does not reject (Wilson 1927).

    Those with ``|successes/trials - p| <= z·sqrt(p·(1-p)/trials)``; unlike the normal interval it
    stays inside 0 to 1 and is usable for few trials.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, weight = successes / trials, z * z / trials
    centre = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / trials + weight / (4 * trials)) / (1 + weight)
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return low, high


def first_word(text: str) -> str:
    """The first word in lower case without punctuation around it, empty where there is none.

    Words are what white space separates, so "Yes." and "**yes**" are "yes", "Yes/No" is neither.
    """
    for word in text.split():
        letters = [i for i, char in enumerate(word) if char.isalnum()]
        if letters:
            return word[letters[0] : letters[-1] + 1].casefold()
    return ""
