"""Rows cut from a corpus as it lies: every token is a target once an epoch, nothing is padded."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fabric_jax.data.batch import Batch
from fabric_jax.data.batch_stream import shuffled
from fabric_jax.data.corpus import TokenSplit
from fabric_jax.errors import FabricError


class TokenStream:
    """An endless sequence of batches of a token sequence, which knows its position.

    Row i is the tokens from i·T on, its targets those one further. The order of rows is a function
    of (seed, epoch) alone. The last row of the sequence may be short, and the last batch of an
    epoch is filled up with empty rows.

    Args:
        split: the sequence.
        length: T, positions in a row.
        rows: of a micro-batch, B.
        accumulation: A, micro-batches in a batch; None leaves the axis out.
        seed: of the order of rows; None keeps the order of the sequence.
        document_mask: whether documents that share a row are kept apart: attention stays inside one
            and the first token of each is no target. Otherwise a row is read as one document.
        corpus: digest of the corpus, so that a position in another one is refused.
    """

    def __init__(
        self,
        split: TokenSplit,
        *,
        length: int,
        rows: int,
        accumulation: int | None,
        seed: int | None,
        document_mask: bool = True,
        corpus: str = "",
    ) -> None:
        """Starts at the first batch of epoch 0."""
        self._split = split
        self._length, self._micro, self._accumulation = length, rows, accumulation
        self._seed, self._document_mask = seed, document_mask
        self._epoch, self._batch = 0, 0
        self._share = (0, rows)
        self._order: tuple[int, NDArray[np.int64]] | None = None
        named = (corpus, length, rows, accumulation, seed, document_mask)
        self.fingerprint = hashlib.sha256(repr(named).encode()).hexdigest()

    def take_share(self, first: int, last: int) -> None:
        """From now on batches hold the rows from ``first`` to before ``last`` of each micro-batch.

        Order, positions and the number of batches stay those of the whole.
        """
        self._share = (first, last)

    @property
    def rows_in_micro_batch(self) -> int:
        """B, all shares together."""
        return self._micro

    @property
    def row_count(self) -> int:
        """Rows of an epoch."""
        return -(-(self._split.tokens - 1) // self._length)

    def batches_in_epoch(self, epoch: int) -> int:
        """Batches of one epoch, the last one included however few rows it holds."""
        del epoch
        return -(-self.row_count // self._rows_of_batch)

    def batches_in_epochs(self, epochs: float) -> int:
        """Batches of several epochs; a fraction counts the leading part of the next one."""
        return int(np.ceil(self.batches_in_epoch(0) * epochs))

    def epoch(self, epoch: int = 0) -> Iterator[Batch]:
        """The batches of one epoch; the position of the stream stays as it is."""
        for batch in range(self.batches_in_epoch(epoch)):
            yield self._at(epoch, batch)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch; past the last of an epoch, the first of the next one."""
        batch = self._at(self._epoch, self._batch)
        self._batch += 1
        if self._batch == self.batches_in_epoch(self._epoch):
            self._epoch, self._batch = self._epoch + 1, 0
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position: what is to be saved beside the step, as JSON values."""
        return {"epoch": self._epoch, "batch": self._batch, "fingerprint": self.fingerprint}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a position from ``get_state``, of this or another process.

        Raises:
            FabricError: the position belongs to another corpus or other settings, or is malformed.
        """
        epoch, batch = state.get("epoch"), state.get("batch")
        if state.get("fingerprint") != self.fingerprint:
            raise FabricError(
                "the corpus or the shape of batches changed since the checkpoint was saved",
                fix="Resume with the same ones, or start a new run",
            )
        if not isinstance(epoch, int) or not isinstance(batch, int) or epoch < 0:
            raise FabricError("malformed position in the data", found=repr(dict(state)))
        if not 0 <= batch < self.batches_in_epoch(epoch):
            raise FabricError("malformed position in the data", found=repr(dict(state)))
        self._epoch, self._batch = epoch, batch

    @property
    def _rows_of_batch(self) -> int:
        return self._micro * (self._accumulation or 1)

    def _at(self, epoch: int, batch: int) -> Batch:
        order = self._order_of(epoch)
        count = self._rows_of_batch
        chosen = order[batch * count : (batch + 1) * count]
        first, last = self._share
        own = last - first
        fields = np.zeros((5, count // self._micro, own, self._length), np.int32)
        for place, row in enumerate(chosen):
            micro, place = divmod(place, self._micro)
            if first <= place < last:
                fields[:, micro, place - first] = self._row(int(row))
        shape = (own, self._length)
        if self._accumulation is not None:
            shape = (self._accumulation, *shape)
        tokens, targets, mask, segments, positions = (part.reshape(shape) for part in fields)
        # Batches stay on the host until the step that takes them; the fields are annotated for jax.
        arrays: Any = {
            "tokens": tokens,
            "targets": targets,
            "loss_mask": mask.astype(np.float32),
            "segment_ids": segments,
            "positions": positions,
        }
        return Batch(**arrays)

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        if self._seed is None:
            return np.arange(self.row_count)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, shuffled(self.row_count, self._seed, epoch, "stream"))
        return self._order[1]

    def _row(self, row: int) -> NDArray[np.int32]:
        """Tokens, targets, loss mask, segment ids and positions of a row, int32 [5, T]."""
        start = row * self._length
        stop = min(start + self._length, self._split.tokens - 1)
        ids = self._split.read(start, stop + 1)
        size = stop - start
        fields = np.zeros((5, self._length), np.int32)
        fields[0, :size], fields[1, :size] = ids[:-1], ids[1:]
        if not self._document_mask:
            fields[2:4, :size], fields[4, :size] = 1, np.arange(size)
            return fields
        starts = self._split.starts
        first = np.searchsorted(starts, start, "right") - 1
        inner = starts[first + 1 : np.searchsorted(starts, stop, "right")] - start
        begins = np.zeros(size + 1, np.int64)
        begins[inner] = 1
        segments = 1 + np.cumsum(begins[:-1])
        opened = np.concatenate([[0], inner])[segments - 1]
        fields[2, :size] = 1 - begins[1:]
        fields[1, :size] *= fields[2, :size]
        fields[3, :size] = segments
        fields[4, :size] = np.arange(size) - opened
        return fields
