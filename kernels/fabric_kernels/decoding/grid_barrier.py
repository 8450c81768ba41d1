"""All programs of a launch wait for each other, without ending it.

It needs all of them to run at the same time: no more programs than multiprocessors, and nothing
else on the device that stays. Triton's atomics release what a program's threads have stored before
(PTX ISA, memory consistency model: a barrier of the block, then one thread's release at the scope
of the device). Waiting is a loop of volatile loads: an acquire in each would cost several times
that. So what others have stored must be read by volatile loads too, past the first-level cache.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from fabric_kernels.triton_call import Mode

Ref = Any


def arrive(counter: Ref, mode: Mode) -> None:
    """Says that this program is done so far.

    Args:
        counter: int32 [1], zero at the start of the launch.
        mode: what runs it.
    """
    if mode == "interpret":
        # One program, which never waits.
        return
    plgpu.debug_barrier()
    plgpu.atomic_add(counter, (jnp.int32(0),), 1)


def wait(counter: Ref, arrivals: jax.Array, threads: int, mode: Mode) -> jax.Array:
    """Waits until there have been so many arrivals; how many there are, int32 [].

    What this returns must end in something that is stored: JAX leaves out a loop that only reads
    where nobody asks for its result.

    Args:
        counter: as for :func:`arrive`.
        arrivals: int32 [].
        threads: of a program; one of them looks.
        mode: what runs it.
    """
    if mode == "interpret":
        return arrivals
    lanes = lax.iota(jnp.int32, threads)
    places, first = jnp.zeros_like(lanes), lanes == 0

    def look() -> jax.Array:
        return jnp.max(plgpu.load(counter.at[places], mask=first, other=0, volatile=True))

    seen = lax.while_loop(lambda seen: seen < arrivals, lambda _: look(), look())
    plgpu.debug_barrier()
    return seen
