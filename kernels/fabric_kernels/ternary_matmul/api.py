"""Products with a packed ternary matrix: one signature, several implementations."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from fabric_kernels.packing import packed_width
from fabric_kernels.ternary_matmul import xla

Implementation = Literal["xla"]


class _Functions(NamedTuple):
    matmul: Callable[[jax.Array, jax.Array], jax.Array]
    matmul_transposed: Callable[[jax.Array, jax.Array, int], jax.Array]


_IMPLEMENTATIONS: dict[str, _Functions] = {"xla": _Functions(xla.matmul, xla.matmul_transposed)}


def select_implementation(implementation: Implementation | None = None) -> Implementation:
    """The implementation that a call with these arguments runs; ``None`` means the best one."""
    if implementation is None:
        return "xla"
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"ternary_matmul has the implementations {', '.join(get_args(Implementation))}; "
            f"found {implementation!r}"
        )
    return implementation


def ternary_matmul(
    x: jax.Array, packed: jax.Array, *, implementation: Implementation | None = None
) -> jax.Array:
    """Multiplies by the transpose of a packed ternary matrix.

    Args:
        x: [..., K], int8 codes or floats.
        packed: uint8 [N, ceil(K / 4)] in the ``ternary2`` layout of ``fabric_kernels.packing``.
        implementation: which one to run; ``None`` picks. A named one runs or raises.

    Returns:
        [..., N]. For int8 ``x`` the exact int32 product (K below 2^24). For float ``x`` the product
        in its dtype; that form is differentiable in ``x``, with ``dx = g · codes``.

    Raises:
        TypeError: ``packed`` is not uint8, or ``x`` is neither int8 nor a float.
        ValueError: the shapes do not fit, or the implementation is unknown.
    """
    functions = _IMPLEMENTATIONS[select_implementation(implementation)]
    _check(packed, x.shape[-1])
    if x.dtype == jnp.int8:
        return functions.matmul(x, packed)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"ternary_matmul takes int8 codes or floats, found {x.dtype}")
    return _float_matmul(functions, x.shape[-1], x, packed)


def ternary_matmul_transposed(
    g: jax.Array, packed: jax.Array, k: int, *, implementation: Implementation | None = None
) -> jax.Array:
    """Multiplies by a packed ternary matrix: ``g[..., N] · codes[N, k]``, in the dtype of ``g``.

    This is the product of a backward pass, where ``g`` is the gradient by the output. It is itself
    differentiable in ``g``.

    Raises:
        TypeError: ``packed`` is not uint8, or ``g`` is not a float.
        ValueError: the shapes do not fit, or the implementation is unknown.
    """
    functions = _IMPLEMENTATIONS[select_implementation(implementation)]
    _check(packed, k)
    if not jnp.issubdtype(g.dtype, jnp.floating):
        raise TypeError(f"ternary_matmul_transposed takes floats, found {g.dtype}")
    if g.shape[-1] != packed.shape[0]:
        raise ValueError(
            f"the last axis of g must have the {packed.shape[0]} outputs of the matrix, "
            f"found {g.shape[-1]}"
        )
    return _float_transposed(functions, k, g, packed)


def _check(packed: jax.Array, k: int) -> None:
    if packed.dtype != jnp.uint8:
        raise TypeError(f"packed ternary weights are uint8, found {packed.dtype}")
    if packed.ndim != 2 or packed.shape[1] != packed_width(k):
        raise ValueError(
            f"packed ternary weights for {k} inputs have shape [N, {packed_width(k)}], "
            f"found {list(packed.shape)}"
        )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _float_matmul(functions: _Functions, k: int, x: jax.Array, packed: jax.Array) -> jax.Array:
    del k
    return functions.matmul(x, packed)


def _float_matmul_fwd(
    functions: _Functions, k: int, x: jax.Array, packed: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _float_matmul(functions, k, x, packed), packed


def _float_matmul_bwd(
    functions: _Functions, k: int, packed: jax.Array, g: jax.Array
) -> tuple[jax.Array, np.ndarray]:
    return _float_transposed(functions, k, g, packed), _no_gradient(packed)


_float_matmul.defvjp(_float_matmul_fwd, _float_matmul_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _float_transposed(functions: _Functions, k: int, g: jax.Array, packed: jax.Array) -> jax.Array:
    return functions.matmul_transposed(g, packed, k)


def _float_transposed_fwd(
    functions: _Functions, k: int, g: jax.Array, packed: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _float_transposed(functions, k, g, packed), packed


def _float_transposed_bwd(
    functions: _Functions, k: int, packed: jax.Array, h: jax.Array
) -> tuple[jax.Array, np.ndarray]:
    return _float_matmul(functions, k, h, packed), _no_gradient(packed)


_float_transposed.defvjp(_float_transposed_fwd, _float_transposed_bwd)


def _no_gradient(packed: jax.Array) -> np.ndarray:
    """The cotangent of an integer argument."""
    return np.zeros(packed.shape, jax.dtypes.float0)
