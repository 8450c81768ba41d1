"""What the data room hands to training and evaluation."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
from jaxtyping import Array, Float32, Int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of packed or padded token sequences; every array has shape [B, T].

    Training stacks the micro-batches of a step: there every array has shape [A, B, T].

    Attributes:
        tokens: inputs.
        targets: the token that follows each input inside its document, 0 where there is none.
        loss_mask: weight of each target in the loss: 1 where it is trained on, else 0.
        segment_ids: 0 for padding, documents of a row count from 1; attention stays inside one.
        positions: position of each token inside its document, from 0.
    """

    tokens: Int32[Array, "B T"]
    targets: Int32[Array, "B T"]
    loss_mask: Float32[Array, "B T"]
    segment_ids: Int32[Array, "B T"]
    positions: Int32[Array, "B T"]


class BatchSource(Protocol):
    """An endless sequence of batches, epoch after epoch, that knows its position."""

    @property
    def rows_in_micro_batch(self) -> int:
        """B, all shares together."""
        ...

    def take_share(self, first: int, last: int) -> None:
        """From now on batches hold the rows from ``first`` to before ``last`` of each micro-batch.

        Order, positions and the number of batches stay those of the whole.
        """
        ...

    def batches_in_epoch(self, epoch: int) -> int:
        """Batches of one epoch."""
        ...

    def batches_in_epochs(self, epochs: float) -> int:
        """Batches of several epochs; a fraction counts the leading part of the next one."""
        ...

    def epoch(self, epoch: int = 0) -> Iterator[Batch]:
        """The batches of one epoch; the position stays as it is."""
        ...

    def __next__(self) -> Batch:
        """The next batch; past the last of an epoch, the first of the next one."""
        ...

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON values."""
        ...

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a position from ``get_state``."""
        ...
