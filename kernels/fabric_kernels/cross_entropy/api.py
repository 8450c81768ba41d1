"""The loss of each row of logits and its gradient by them, in as few passes as there can be."""

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fabric_kernels.triton_call import kernel_module, on_platform

Implementation = Literal["xla", "triton"]


def logits_gradient(
    logits: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    dtype: DTypeLike,
    *,
    z_loss: float = 0.0,
    count: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """``weights · (lse - z[target] + z_loss · lse²)`` and its gradient by ``z``; float32 inside.

    Args:
        logits: z, floats [M, V].
        targets: int32 [M].
        weights: float32 [M].
        dtype: of the gradient.
        z_loss: weight of the squared ``lse = logsumexp(z)``.
        count: logits of a row that there are, those behind them being anything; None for V.
        implementation: ``triton`` reads each row from memory once and is for GPUs, ``xla`` takes
            three passes; None picks. A named one runs or raises.

    Returns:
        Losses float32 [M], and [M, V] in ``dtype``.

    Raises:
        ValueError: the name is unknown.
        NotImplementedError: this JAX has no Pallas Triton.
    """
    if implementation is None:
        implementation = "triton" if jax.default_backend() == "gpu" else "xla"
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"logits_gradient has the implementations {', '.join(get_args(Implementation))}; "
            f"found {implementation!r}"
        )
    if implementation == "xla":
        return _by_xla(_hidden(logits, count), targets, weights, dtype, z_loss)
    module = kernel_module("fabric_kernels.cross_entropy.triton")
    call = partial(module.logits_gradient, z_loss, jnp.dtype(dtype), count or logits.shape[-1])
    losses, gradient = on_platform(call, logits, targets, weights)
    return losses, gradient


def _hidden(logits: jax.Array, count: int | None) -> jax.Array:
    """With minus infinity behind the first ``count`` of each row."""
    if count is None or count == logits.shape[-1]:
        return logits
    at = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return jnp.where(at < count, logits, jnp.array(-jnp.inf, logits.dtype))


def _by_xla(
    logits: jax.Array, targets: jax.Array, weights: jax.Array, dtype: DTypeLike, z_loss: float
) -> tuple[jax.Array, jax.Array]:
    logits = logits.astype(jnp.float32)
    largest = jnp.max(logits, axis=-1)
    # Largest logit and sum are for both, loss and gradient: a tile is read no oftener.
    exponentials = jnp.exp(logits - largest[:, None])
    sums = jnp.sum(exponentials, axis=-1)
    normaliser = largest + jnp.log(sums)
    losses = normaliser - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    shares = exponentials / sums[:, None]
    if z_loss:
        losses = losses + z_loss * jnp.square(normaliser)
        shares = shares * (1 + 2 * z_loss * normaliser[:, None])
    gradient = shares - jax.nn.one_hot(targets, logits.shape[-1])
    return weights * losses, (gradient * weights[:, None]).astype(dtype)
