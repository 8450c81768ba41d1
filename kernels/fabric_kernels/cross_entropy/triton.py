"""A row of logits a program (Triton): its largest and sum while it is read, then its gradient.

What is read the second time lies in a cache: the rows of all programs that run at once do.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from fabric_kernels.triton_call import Mode
from fabric_kernels.triton_programs import program_id

BLOCK = 8192
"""Logits of a row at a time."""
WARPS = 16
LOWEST = -3e38
"""Where a maximum starts; finite, since -inf less itself is not a number."""


def logits_gradient(
    z_loss: float,
    dtype: jnp.dtype,
    count: int,
    logits: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    mode: Mode,
) -> tuple[jax.Array, jax.Array]:
    """As ``api.logits_gradient``; a gradient of the dtype of the logits takes their place."""
    m, v = logits.shape
    block = min(BLOCK, 1 << (v - 1).bit_length())

    def kernel(logits: Any, targets: Any, weights: Any, losses: Any, gradient: Any) -> None:
        token, start = program_id(mode), (jnp.float32(LOWEST), jnp.float32(0))
        part = partial(_part, logits, token, block, count)

        def add(i: jax.Array, known: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            largest, total = known
            z = part(i)[0]
            new = jnp.maximum(largest, jnp.max(z))
            return new, total * jnp.exp(largest - new) + jnp.sum(jnp.exp(z - new))

        largest, total = lax.fori_loop(0, pl.cdiv(v, block), add, start)
        normaliser = largest + jnp.log(total)
        target, weight = targets[token], weights[token]
        loss = normaliser - logits[token, target].astype(jnp.float32)
        losses[token] = weight * (loss + z_loss * normaliser * normaliser)
        share = (1.0 + 2.0 * z_loss * normaliser) / total

        def store(i: jax.Array, _: None) -> None:
            z, at = part(i)
            inside = None if v % block == 0 else at < v
            value = (jnp.exp(z - largest) * share - jnp.where(at == target, 1.0, 0.0)) * weight
            place = gradient.at[token, pl.ds(i * block, block)]
            plgpu.store(place, value.astype(dtype), mask=inside)

        lax.fori_loop(0, pl.cdiv(v, block), store, None)

    losses, gradient = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((m,), jnp.float32), jax.ShapeDtypeStruct((m, v), dtype)],
        grid=(m,),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=2),
        input_output_aliases={0: 1} if logits.dtype == dtype else {},
        interpret=mode == "interpret",
        name="logits_gradient",
    )(logits, targets, weights)
    return losses, gradient


def _part(
    logits: Any, token: jax.Array, block: int, count: int, i: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Block ``i`` of a row in float32, minus infinity from ``count`` on, and its columns."""
    at = i * block + lax.iota(jnp.int32, block)
    inside = None if count == logits.shape[1] and count % block == 0 else at < count
    other = None if inside is None else jnp.array(-jnp.inf, logits.dtype)
    ref = logits.at[token, pl.ds(i * block, block)]
    return plgpu.load(ref, mask=inside, other=other).astype(jnp.float32), at
