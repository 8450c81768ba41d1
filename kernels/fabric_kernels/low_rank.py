"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) as products of arrays."""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from fabric_kernels.gradients import with_gradient_of

NARROW_PRODUCT = "narrow_product"
"""The name under which rematerialisation policies know what adapters keep for the backward pass."""


@partial(jax.tree_util.register_dataclass, data_fields=["a", "b"], meta_fields=["scale"])
@dataclass(frozen=True)
class LowRank:
    """An adapter beside an [N, K] matrix: ``scale · (x · A^T) · B``.

    B keeps the rank first so that its gradient comes out of the product as it is stored.

    Attributes:
        a: [R, K].
        b: [R, N].
        scale: a constant.
    """

    a: jax.Array
    b: jax.Array
    scale: float = field(metadata={"static": True})


def low_rank_product(x: jax.Array, adapter: LowRank, *, kept: jax.Array | None = None) -> jax.Array:
    """``scale · (x[..., K] · A^T) · B``, [..., N] in the dtype of ``x``; sums in float32.

    The gradient is that of the product of ``kept`` [..., K] where it is given.
    """
    if kept is not None:
        exact = lax.stop_gradient(low_rank_product(x, adapter))
        return with_gradient_of(exact, low_rank_product(kept, adapter))
    narrow = contract_with(x, adapter.a, 1) * jnp.asarray(adapter.scale, x.dtype)
    return _widen(narrow, adapter.b)


@jax.custom_vjp
def _widen(narrow: jax.Array, b: jax.Array) -> jax.Array:
    """``narrow[..., R] · b[R, N]``.

    Its own gradient rule only fixes the order of a product: ``db = narrow^T · g`` transposes the
    narrow operand, where the built-in rule has XLA transpose ``g`` [..., N] in every layer, which
    on CPU costs more than the product.
    """
    return contract_with(narrow, b, 0)


def _widen_fwd(narrow: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return contract_with(narrow, b, 0), (narrow, b)


def _widen_bwd(residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    narrow, b = residuals
    rows, columns = narrow.reshape(-1, narrow.shape[-1]), g.reshape(-1, g.shape[-1])
    db = contract_with(rows.T, columns, 0)
    return contract_with(g, b, 1), db.astype(b.dtype)


_widen.defvjp(_widen_fwd, _widen_bwd)


def contract_with(x: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
    """The last axis of ``x`` against ``axis`` of a weight cast to x's dtype; float32 sums."""
    product = lax.dot_general(
        x,
        weight.astype(x.dtype),
        (((x.ndim - 1,), (axis,)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    return product.astype(x.dtype)
