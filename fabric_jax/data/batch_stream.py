"""Batches in a reproducible order that can be left and taken up again anywhere."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, SupportsIndex

import jax
import numpy as np
from numpy.typing import NDArray

from fabric_jax.data.batch import Batch
from fabric_jax.data.documents import Documents
from fabric_jax.data.packing import first_fit
from fabric_jax.errors import FabricError


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """How rows become batches.

    Attributes:
        max_length: T, positions in a row.
        batch_size: B, rows in a micro-batch.
        accumulation: A, micro-batches in a batch; None leaves the axis out.
        packing: several documents a row.
        pad_id: the token of padding; attention and loss never see it.
    """

    max_length: int
    batch_size: int
    accumulation: int | None
    packing: bool
    pad_id: int

    @property
    def rows(self) -> int:
        """Rows in a batch, micro-batches together."""
        return self.batch_size * (self.accumulation or 1)


class BatchStream:
    """An endless sequence of batches, epoch after epoch, that knows its position.

    Every epoch has its own order of documents, packing and order of rows, all pure functions of
    (seed, epoch). The last batch of an epoch is filled up with empty rows. Arrays have shape
    [A, B, T], or [B, T] where ``shape.accumulation`` is None.

    Args:
        documents: what fits a row of ``shape``.
        shape: the shape of batches.
        seed: of the order; None keeps the order of ``documents`` in every epoch.
        fingerprint: names the data in saved positions, so that another run's is refused.
    """

    def __init__(
        self, documents: Documents, shape: BatchShape, *, seed: int | None, fingerprint: str
    ) -> None:
        """Starts at the first batch of epoch 0."""
        self._documents = documents
        self._shape = shape
        self._seed = seed
        self._fingerprint = fingerprint
        self._epoch = 0
        self._batch = 0
        # Planning takes seconds for a million documents; a run needs the epoch it is in and, while
        # it counts its steps, one other.
        self._rows = lru_cache(maxsize=2)(self._plan)
        self._dataset = lru_cache(maxsize=2)(self._batches)
        self._counts: dict[int, int] = {}
        self._share = (0, shape.batch_size)

    def take_share(self, first: int, last: int) -> None:
        """From now on batches hold the rows from ``first`` to before ``last`` of each micro-batch.

        Processes that train together take a share each: order, positions and the number of batches
        stay those of the whole.
        """
        self._share = (first, last)
        self._dataset.cache_clear()

    @property
    def documents(self) -> Documents:
        """What the batches are made of."""
        return self._documents

    @property
    def rows_in_micro_batch(self) -> int:
        """B, all shares together."""
        return self._shape.batch_size

    def rows_in_epoch(self, epoch: int) -> int:
        """Rows that hold documents; packing fills each epoch's differently."""
        if self._seed is None or not self._shape.packing:
            epoch = 0
        if epoch not in self._counts:
            self._counts[epoch] = len(self._rows(epoch))
        return self._counts[epoch]

    def batches_in_epoch(self, epoch: int) -> int:
        """Batches of one epoch, the last one included however few documents it holds."""
        return -(-self.rows_in_epoch(epoch) // self._shape.rows)

    def batches_in_epochs(self, epochs: float) -> int:
        """Batches of several epochs; a fraction counts the leading part of the next epoch."""
        whole = int(epochs)
        batches = sum(self.batches_in_epoch(epoch) for epoch in range(whole))
        if epochs > whole:
            batches += int(np.ceil(self.batches_in_epoch(whole) * (epochs - whole)))
        return batches

    def epoch(self, epoch: int = 0) -> Iterator[Batch]:
        """The batches of one epoch; the position of the stream stays as it is."""
        dataset = self._dataset(epoch)
        for i in range(len(dataset)):
            yield dataset[i]

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch; past the last of an epoch, the first of the next one."""
        batch: Batch = self._dataset(self._epoch)[self._batch]
        self._batch += 1
        if self._batch == self.batches_in_epoch(self._epoch):
            self._epoch, self._batch = self._epoch + 1, 0
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position: what is to be saved beside the step, as JSON values."""
        return {"epoch": self._epoch, "batch": self._batch, "fingerprint": self._fingerprint}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a position from ``get_state``, of this or another process.

        Raises:
            FabricError: the position belongs to other data, settings or tokenizer, or is malformed.
        """
        epoch, batch = state.get("epoch"), state.get("batch")
        if not isinstance(epoch, int) or not isinstance(batch, int) or epoch < 0:
            raise FabricError("malformed position in the data", found=repr(dict(state)))
        if state.get("fingerprint") != self._fingerprint:
            raise FabricError(
                "the data, its settings or the tokenizer changed since the checkpoint was saved",
                fix="Resume with the same ones, or start a new run from the adapter",
            )
        if not 0 <= batch < self.batches_in_epoch(epoch):
            raise FabricError("malformed position in the data", found=repr(dict(state)))
        self._epoch, self._batch = epoch, batch

    def _plan(self, epoch: int) -> list[NDArray[np.int64]]:
        """The documents of each row, rows in the order in which they are batched."""
        order = np.arange(len(self._documents))
        if self._seed is not None:
            order = shuffled(len(order), self._seed, epoch, "documents")
        if not self._shape.packing:
            return list(order[:, None])
        bins = first_fit(self._documents.positions[order], self._shape.max_length)
        by_bin = np.argsort(bins, kind="stable")
        ends = np.cumsum(np.bincount(bins))
        rows = np.split(order[by_bin], ends[:-1])
        if self._seed is None:
            return rows
        # First-fit leaves early rows with many short documents, so rows are shuffled too.
        return [rows[i] for i in shuffled(len(rows), self._seed, epoch, "rows")]

    def _batches(self, epoch: int) -> Any:
        """The batches of an epoch as a grain data set with random access."""
        import grain

        if self._seed is None:
            epoch = 0
        rows = self._rows(epoch)
        first, last = self._share
        own = (self._shape.accumulation or 1) * (last - first)
        if own < self._shape.rows:
            rows = self._own_rows(rows)
        source = grain.MapDataset.source(_Rows(self._documents, rows, self._shape))
        return source.batch(own, batch_fn=self._stack)

    def _own_rows(self, rows: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
        """The rows of the share, those that fill up the last batch included."""
        first, last = self._share
        empty = np.zeros(0, np.int64)
        filled = [*rows, *[empty] * (-len(rows) % self._shape.rows)]
        size = self._shape.batch_size
        return [row for i, row in enumerate(filled) if first <= i % size < last]

    def _stack(self, rows: Any) -> Batch:
        """Stacks rows to the one shape all batches have."""
        a, t = self._shape.accumulation, self._shape.max_length
        b = self._share[1] - self._share[0]
        empty = _assemble(self._documents, np.zeros(0, np.int64), self._shape)
        filled = [*rows, *[empty] * ((a or 1) * b - len(rows))]
        shape = (b, t) if a is None else (a, b, t)
        return jax.tree.map(lambda *leaves: np.stack(leaves).reshape(shape), *filled)


class _Rows:
    """Random access to packed rows, as grain expects of a source."""

    def __init__(
        self, documents: Documents, rows: list[NDArray[np.int64]], shape: BatchShape
    ) -> None:
        self._documents = documents
        self._rows = rows
        self._shape = shape

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: SupportsIndex) -> Batch:
        return _assemble(self._documents, self._rows[index], self._shape)


def _assemble(documents: Documents, row: NDArray[np.int64], shape: BatchShape) -> Batch:
    """One row of documents one after another; arrays [T]."""
    tokens = np.full(shape.max_length, shape.pad_id, np.int32)
    targets, segments, positions = np.zeros((3, shape.max_length), np.int32)
    mask = np.zeros(shape.max_length, np.float32)
    at = 0
    for segment, document in enumerate(row, 1):
        start, end = documents.offsets[document], documents.offsets[document + 1]
        here = slice(at, at + int(end - start) - 1)
        tokens[here] = documents.tokens[start : end - 1]
        targets[here] = documents.tokens[start + 1 : end]
        mask[here] = documents.trainable[start + 1 : end]
        segments[here] = segment
        positions[here] = np.arange(here.stop - at)
        at = here.stop
    # Batches stay on the host until the step that takes them; the fields are annotated for jax.
    fields: Any = {
        "tokens": tokens,
        "targets": targets,
        "loss_mask": mask,
        "segment_ids": segments,
        "positions": positions,
    }
    return Batch(**fields)


def shuffled(n: int, *stream: int | str) -> NDArray[np.int64]:
    """A permutation of ``range(n)`` named by (seed, epoch, use), int64 [n].

    It sorts raw words of a counter-based generator: numpy promises that these never change, as it
    does not for its permutations. Grain's shuffle takes milliseconds an item where there are few.
    """
    key = hashlib.sha256("/".join(map(str, stream)).encode()).digest()
    generator = np.random.Philox(key=int.from_bytes(key[:16], "little"))
    return np.argsort(generator.random_raw(n), kind="stable")
