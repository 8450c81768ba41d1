"""Which program of a launch this one is; the launch after it may begin when all have asked.

On Hopper and later GPUs XLA starts a kernel when those before it have ended, or have said that they
can do without its place (programmatic dependent launch; PTX ISA, ``griddepcontrol``), and lets it
wait for what they store before its first instruction. What is said early saves the time that a
launch takes to reach the multiprocessors: about a microsecond, of the three to ten that many of
these kernels run. Nothing is read sooner, and where XLA starts kernels otherwise it says nothing.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from fabric_kernels.nvidia import HOPPER, compute_capability
from fabric_kernels.triton_call import Mode

LAUNCH = "griddepcontrol.launch_dependents; mov.b32 $0, $1;"


def program_id(mode: Mode) -> jax.Array:
    """As ``pl.program_id(0)``, int32 []: to be used first, by all programs of a kernel.

    Not by kernels whose programs wait for each other: these need the multiprocessors to themselves.
    """
    own = pl.program_id(0)
    if mode != "cuda" or compute_capability() < HOPPER:
        return own
    # What the instruction returns is the number: without a use it would not be there. It takes
    # tensors only, and one of a single element is in every thread.
    result = jax.ShapeDtypeStruct((1,), jnp.int32)
    [told] = plgpu.elementwise_inline_asm(
        LAUNCH, args=[own.reshape(1)], constraints="=r,r", pack=1, result_shape_dtypes=[result]
    )
    return jnp.max(told)
