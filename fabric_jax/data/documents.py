"""Tokenised documents in flat arrays, and what becomes of those that are too long."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fabric_jax.data.config import LongRows


@dataclass(frozen=True, kw_only=True, eq=False)
class Documents:
    """Documents one after another: document i is ``tokens[offsets[i]:offsets[i + 1]]``.

    Attributes:
        tokens: int32 [N].
        trainable: bool [N], whether a token counts in the loss when it is a target.
        offsets: int64 [documents + 1].
    """

    tokens: NDArray[np.int32]
    trainable: NDArray[np.bool_]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, int64 [documents]."""
        return np.diff(self.offsets)

    @property
    def positions(self) -> NDArray[np.int64]:
        """Positions each document takes in a row: its last token is a target only."""
        return self.lengths - 1

    @property
    def trainable_targets(self) -> NDArray[np.int64]:
        """Targets with a loss in each document, int64 [documents]; the first token is never one."""
        firsts = np.minimum(self.offsets[:-1] + 1, self.offsets[1:])
        sums = np.concatenate([[0], np.cumsum(self.trainable, dtype=np.int64)])
        return sums[self.offsets[1:]] - sums[firsts]

    def take(self, indices: NDArray[np.int64]) -> "Documents":
        """The documents of ``indices``, int64 [n], in that order."""
        starts = self.offsets[indices]
        return self.cut(starts, self.offsets[indices + 1])

    def cut(self, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> "Documents":
        """New documents from the token ranges ``[starts[i], ends[i])``."""
        lengths = ends - starts
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        where = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Documents(
            tokens=self.tokens[where], trainable=self.trainable[where], offsets=offsets
        )


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Documents that fit a row, and what was done to make them.

    Attributes:
        documents: each with at least one trainable target.
        kept: rows that gave at least one document.
        truncated: kept rows that lost their end.
        split: kept rows that became several documents.
        dropped: reasons and numbers of the rows that gave none.
    """

    documents: Documents
    kept: int
    truncated: int
    split: int
    dropped: dict[str, int]


def join_documents(
    tokens: Sequence[NDArray[np.int32]], trainable: Sequence[NDArray[np.bool_]]
) -> Documents:
    """One ``Documents`` of many arrays, the two of a document equally long."""
    offsets = np.cumsum([0, *(len(ids) for ids in tokens)], dtype=np.int64)
    return Documents(
        tokens=_concatenate(tokens, np.dtype(np.int32)),
        trainable=_concatenate(trainable, np.dtype(np.bool_)),
        offsets=offsets,
    )


def fit_documents(documents: Documents, max_length: int, long_rows: LongRows) -> Fitted:
    """Makes every document fit ``max_length`` positions and have something to learn.

    n tokens take n - 1 positions, the last being a target only. ``split`` cuts with an overlap of
    one token, so that each token but the first of the row remains a target exactly once.
    """
    lengths = documents.lengths
    long = documents.positions > max_length
    rows = np.arange(len(documents))
    if long_rows == "split":
        pieces = np.maximum(-(-documents.positions // max_length), 1)
        rows = np.repeat(rows, pieces)
        first_piece = np.cumsum(pieces) - pieces
        piece = np.arange(len(rows)) - first_piece[rows]
        starts = documents.offsets[rows] + piece * max_length
        ends = np.minimum(starts + max_length + 1, documents.offsets[rows + 1])
        fitted = documents.cut(starts, ends)
    elif long_rows == "truncate":
        starts = documents.offsets[:-1]
        fitted = documents.cut(starts, starts + np.minimum(lengths, max_length + 1))
    else:
        rows = np.flatnonzero(~long)
        fitted = documents.take(rows)
    useful = np.flatnonzero(fitted.trainable_targets > 0)
    kept = np.zeros(len(documents), np.bool_)
    kept[rows[useful]] = True
    return Fitted(
        documents=fitted.take(useful),
        kept=int(kept.sum()),
        truncated=int((kept & long).sum()) if long_rows == "truncate" else 0,
        split=int((kept & long).sum()) if long_rows == "split" else 0,
        dropped=_reasons(documents, kept, long, max_length, long_rows),
    )


def _reasons(
    documents: Documents,
    kept: NDArray[np.bool_],
    long: NDArray[np.bool_],
    max_length: int,
    long_rows: LongRows,
) -> dict[str, int]:
    """Why rows gave no document."""
    had_targets = documents.trainable_targets > 0
    reasons = Counter[str]()
    for i in np.flatnonzero(~kept):
        if long[i] and long_rows == "drop":
            reasons[f"longer than {max_length} positions"] += 1
        elif had_targets[i]:
            reasons[f"nothing to train on within {max_length} positions"] += 1
        elif documents.lengths[i] < 2:
            reasons["empty"] += 1
        else:
            reasons["nothing to train on"] += 1
    return dict(reasons)


def _concatenate(arrays: Iterable[NDArray[Any]], dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype, copy=False)
