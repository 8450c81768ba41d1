"""Time of a product on an accelerator, where a dispatch from Python takes longer than a product.

Products run inside one compiled loop of known length, which the host runs ahead of, over matrices
that together are larger than the caches, as a decoder's are. XLA would move what does not depend on
the loop out of it and drop what is not used: so inputs are tied to the results of the turn before,
and results are what the loop carries.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

SAMPLE_SECONDS = 0.01
"""What a sample would take at the limit of the device; to start one takes about 0.4 ms."""
MOST_TURNS = 1000

Turn = Callable[[jax.Array, Any], Sequence[jax.Array]]
"""The number of the turn and operands to the results of all its products."""


@dataclass(frozen=True, kw_only=True)
class CompiledTurns:
    """A loop of ``turns`` turns, compiled for its operands."""

    run: Callable[[Any], Any]
    operands: Any
    turns: int

    def median_seconds(self, samples: int) -> tuple[float, float]:
        """Seconds of a turn: the median, and the spread of the middle half in parts of it."""
        jax.block_until_ready(self.run(self.operands))
        taken = np.empty(samples)
        for i in range(samples):
            start = time.perf_counter()
            jax.block_until_ready(self.run(self.operands))
            taken[i] = (time.perf_counter() - start) / self.turns
        low, median, high = np.percentile(taken, (25, 50, 75))
        return float(median), float((high - low) / median)


def compile_turns(turn: Turn, operands: Any, *, limit_seconds: float) -> CompiledTurns:
    """Compiles the loop; several may be compiled at once, in threads.

    Args:
        turn: what is timed.
        operands: arrays, made beforehand.
        limit_seconds: what a turn takes at least, from which follows how many make a sample.
    """
    turns = int(np.clip(np.ceil(SAMPLE_SECONDS / limit_seconds), 4, MOST_TURNS))
    shapes = jax.eval_shape(turn, jnp.int32(0), operands)

    def loop(operands: Any) -> Sequence[jax.Array]:
        def body(index: jax.Array, before: Sequence[jax.Array]) -> list[jax.Array]:
            tied, _ = lax.optimization_barrier((operands, before))
            return list(turn(index, tied))

        first = [jnp.zeros(one.shape, one.dtype) for one in shapes]
        return lax.fori_loop(0, turns, body, first)

    return CompiledTurns(
        run=jax.jit(loop).lower(operands).compile(), operands=operands, turns=turns
    )
