"""What a LoRA step has to compute and to read, whatever runs it: the roof over its speed."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """Of one step.

    Attributes:
        operations: multiplications and additions of the model, nothing recomputed: twice the
            weights of linears and head forward and twice backward (frozen weights have no
            gradient), six times the adapter's; attention's products at half the square (causal).
        bytes: that must be read or written at least once: weights forward and backward, the head
            likewise, adapter, its gradient and two moments.
    """

    operations: float
    bytes: float

    def seconds(self, operations_per_second: float, bytes_per_second: float) -> float:
        """The least time, by whichever limit is lower (Williams et al. 2009, the roofline)."""
        return max(self.operations / operations_per_second, self.bytes / bytes_per_second)


def step_costs(definition: Any, arrays: Any, *, rows: int, length: int) -> StepCosts:
    """The costs of a step on ``rows`` rows of ``length`` positions.

    Args:
        definition: the decoder's.
        arrays: its ``MemoryByCategory``.
        rows: in the batch.
        length: positions in a row.
    """
    from fabric_jax.measurement.categories import adapter_parameters

    model, lora = definition.config, definition.options.lora
    head = model.vocab_size * model.hidden_size
    adapter = adapter_parameters(model, lora)
    attention = 6 * length * model.num_heads * model.head_dim * model.num_layers
    positions = rows * length
    operations = positions * (4 * (model.linear_parameters + head) + 6 * adapter + attention)
    read = 2 * (arrays.weights + arrays.scales) + 2 * arrays.embedding_and_head
    # The adapter and its moments are read and written; its gradient is written and read.
    written = 2 * (arrays.adapters + arrays.optimizer) + 8 * adapter
    return StepCosts(operations=float(operations), bytes=float(read + written))
