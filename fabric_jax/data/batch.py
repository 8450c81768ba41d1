"""What the data room hands to training and evaluation."""

from dataclasses import dataclass

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
