"""All programs of a launch wait for each other, without ending it.

It needs all of them to run at the same time: no more programs than multiprocessors, and nothing
else on the device that stays. A program's stores before it arrives are seen by all that have
waited: Triton's atomics acquire and release at the scope of the device, and the barriers of a block
extend that to its threads (PTX ISA, memory consistency model; as CUDA's cooperative groups do).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from fabric_kernels.triton_call import Mode

Ref = Any


def arrive(counter: Ref, mode: Mode) -> jax.Array:
    """Says that this program is done so far; how many arrivals there have been, int32 [].

    Args:
        counter: int32 [1], zero at the start of the launch.
        mode: what runs it.
    """
    if mode == "interpret":
        # One program, which never waits.
        return jnp.int32(0)
    plgpu.debug_barrier()
    return plgpu.atomic_add(counter, (jnp.int32(0),), 1) + 1


def wait(counter: Ref, seen: jax.Array, arrivals: jax.Array, mode: Mode) -> None:
    """Waits until there have been so many arrivals.

    Args:
        counter: as for :func:`arrive`.
        seen: what it returned.
        arrivals: int32 [].
        mode: what runs it.
    """
    if mode == "interpret":
        return

    def again(_: jax.Array) -> jax.Array:
        return plgpu.atomic_add(counter, (jnp.int32(0),), 0)

    lax.while_loop(lambda seen: seen < arrivals, again, seen)
    plgpu.debug_barrier()
