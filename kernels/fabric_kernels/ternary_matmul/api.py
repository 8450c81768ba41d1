"""Products with a packed ternary matrix: one signature, several implementations.

Arguments may be sharded, in plain ``jit`` too (``partitioning``).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fabric_kernels.gradients import with_gradient_of
from fabric_kernels.low_rank import NARROW_PRODUCT as NARROW_PRODUCT
from fabric_kernels.low_rank import LowRank, low_rank_product
from fabric_kernels.packing import Packing
from fabric_kernels.ternary_matmul import cpu, divided
from fabric_kernels.ternary_matmul.adapted_after import (
    adapted_after,
    adapter_gradients,
    normalises,
)
from fabric_kernels.ternary_matmul.prologue import Prologue, apply_prologue
from fabric_kernels.ternary_matmul.select import (
    WITH_ADAPTERS,
    Implementation,
    Product,
    products,
    resolve,
    select_implementation,
    side_implementation,
)
from fabric_kernels.ternary_matmul.weight import TernaryWeight, no_gradient

GradientBits = Literal[16, 24]
"""Bits of a gradient's fixed-point form in the CPU kernel; others compute in float and take no
notice of it."""


def ternary_matmul(
    x: jax.Array,
    packed: jax.Array,
    *,
    packing: Packing = "ternary2",
    implementation: Implementation | None = None,
) -> jax.Array:
    """Multiplies by the transpose of a packed ternary matrix.

    Args:
        x: [..., K], int8 codes or floats.
        packed: uint8 [N, W] in a layout of ``fabric_kernels.packing``.
        packing: which layout.
        implementation: which one to run; ``None`` picks. A named one runs or raises.

    Returns:
        [..., N]. For int8 ``x`` the exact int32 product (K below 2^24). For float ``x`` the product
        in its dtype; that form is differentiable in ``x``, with ``dx = g · codes``.

    Raises:
        TypeError: ``packed`` is not uint8, or ``x`` is neither int8 nor a float.
        ValueError: the shapes do not fit, or a name is unknown.
    """
    chosen = select_implementation(implementation)
    weight = _weight(packed, x.shape[-1], packing)
    if x.dtype == jnp.int8:
        return divided.matmul(_resolved(chosen, "linear", x, weight), x, weight)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"ternary_matmul takes int8 codes or floats, found {x.dtype}")
    return _float_matmul(chosen, x, weight)


def ternary_matmul_transposed(
    g: jax.Array,
    packed: jax.Array,
    k: int,
    *,
    packing: Packing = "ternary2",
    implementation: Implementation | None = None,
) -> jax.Array:
    """Multiplies by a packed ternary matrix: ``g[..., N] · codes[N, k]``, in the dtype of ``g``.

    This is the product of a backward pass, where ``g`` is the gradient by the output. It is itself
    differentiable in ``g``.

    Raises:
        TypeError: ``packed`` is not uint8, or ``g`` is not a float.
        ValueError: the shapes do not fit, or a name is unknown.
    """
    chosen = select_implementation(implementation)
    weight = _weight(packed, k, packing)
    if not jnp.issubdtype(g.dtype, jnp.floating):
        raise TypeError(f"ternary_matmul_transposed takes floats, found {g.dtype}")
    if g.shape[-1] != packed.shape[0]:
        raise ValueError(
            f"the last axis of g must have the {packed.shape[0]} outputs of the matrix, "
            f"found {g.shape[-1]}"
        )
    return _float_transposed(chosen, g, weight)


def ternary_linear(
    x: jax.Array,
    weights: Sequence[TernaryWeight],
    adapters: Sequence[LowRank | None] | None = None,
    *,
    prologue: Prologue | None = None,
    residual: jax.Array | None = None,
    kept: jax.Array | None = None,
    implementation: Implementation | None = None,
    gradient_bits: GradientBits = 16,
) -> tuple[jax.Array, ...]:
    """BitNet's linear map for matrices that share an input (q, k and v; gate and up; or one).

    Args:
        x: [..., K], floats; quantised per token to int8 by absmax, once for all matrices.
        weights: up to four, with the same K, packing and layer.
        adapters: a low-rank adapter for each weight, or None; it reads the un-quantised ``x``.
        prologue: what happens to ``x`` first; some kernels do it on the way.
        residual: [..., N] that the output of the only weight is added to, likewise.
        kept: what the backward pass reads in place of ``x``, of its shape and dtype; the gradient
            then goes to it, and none to ``x``.
        implementation: which one to run; ``None`` picks. A named one runs or raises.
        gradient_bits: 16 halves the time of the backward product on CPU; 24 is as exact as float32.

    Returns:
        For each weight ``scale · (q(x) · codes^T)``, [..., N], in the dtype of ``x``: exact int32
        sums, then one multiplication by both scales; and its adapter's product added. Backward
        ``dx = sum scale · (g · codes)`` plus the adapters' share, the quantiser counting as
        identity; weights and scales get no gradient.

    Raises:
        TypeError: ``x`` is not a float, a weight not uint8 or a scale not float32, or ``kept`` is
            of another dtype than ``x``.
        ValueError: shapes, packings or the number of weights do not fit, a name is unknown, or both
            a prologue and ``kept`` are given, or a residual and several weights.
    """
    chosen = select_implementation(implementation)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"ternary_linear takes floats, found {x.dtype}")
    _check_kept(x, kept)
    if not 1 <= len(weights) <= cpu.MAX_GROUPS:
        raise ValueError(f"expected one to {cpu.MAX_GROUPS} weights, found {len(weights)}")
    for weight in weights:
        weight.check()
        if weight.k != x.shape[-1] or weight.packing != weights[0].packing:
            raise ValueError(
                f"weights of one call share K = {x.shape[-1]} and the packing "
                f"{weights[0].packing}; found K = {weight.k} and {weight.packing}"
            )
        if (weight.layer is None) != (weights[0].layer is None):
            raise ValueError("weights of one call are matrices, or stacks read at the same layer")
    own = tuple(adapters) if adapters is not None else (None,) * len(weights)
    if len(own) != len(weights):
        raise ValueError(f"{len(weights)} weights have as many adapters or None, found {len(own)}")
    for weight, adapter in zip(weights, own, strict=True):
        if adapter is not None:
            _check_adapter(weight, adapter)
    if residual is not None and len(weights) > 1:
        raise ValueError(f"a residual goes with one weight, found {len(weights)}")
    if prologue is not None:
        if kept is not None:
            raise ValueError("what is kept is the input of the quantiser: give it no prologue")
        if all(adapter is None for adapter in own) and _fuses(chosen, x, weights[0]):
            return _linear_after(chosen, x, prologue, residual, tuple(weights))
        if kept is None and normalises(x, prologue, weights, implementation):
            outputs = adapted_after(x, prologue, weights, own)
            return outputs if residual is None else (residual + outputs[0],)
        side = side_implementation(implementation)
        x = apply_prologue(x, prologue.of_layer(weights[0].layer), implementation=side)
    outputs = _linear_of(chosen, gradient_bits, x, kept, tuple(weights), own)
    return outputs if residual is None else (residual + outputs[0],)


def _linear_of(
    chosen: Implementation,
    gradient_bits: GradientBits,
    x: jax.Array,
    kept: jax.Array | None,
    weights: "_Weights",
    own: "_Adapters",
) -> tuple[jax.Array, ...]:
    if _resolved(chosen, "linear", x, weights[0]) in WITH_ADAPTERS:
        return _adapted_linear((chosen, gradient_bits), x, kept, tuple(weights), own)
    base_input = x if kept is None else with_gradient_of(x, kept)
    outputs = cast(tuple[jax.Array, ...], _linear(chosen, base_input, tuple(weights)))
    return tuple(
        y if adapter is None else y + low_rank_product(x, adapter, kept=kept)
        for y, adapter in zip(outputs, own, strict=True)
    )


def ternary_linear_transposed(
    gradients: Sequence[jax.Array],
    weights: Sequence[TernaryWeight],
    *,
    implementation: Implementation | None = None,
    gradient_bits: GradientBits = 16,
) -> jax.Array:
    """``sum_i scale_i · (g_i[..., N_i] · codes_i)``: the gradient of :func:`ternary_linear` by x.

    For callers that have a gradient rule of their own around it; adapters are not part of it.

    Args:
        gradients: by each output, floats of one dtype.
        weights: as in :func:`ternary_linear`.
        implementation: which one to run; ``None`` picks.
        gradient_bits: see :func:`ternary_linear`.

    Returns:
        [..., K] in the dtype of the gradients.
    """
    chosen = select_implementation(implementation)
    chosen = _resolved(chosen, "linear_transposed", gradients[0], weights[0])
    if chosen != "cpu":
        return divided.linear_transposed(chosen, gradients, weights)
    empty = jnp.zeros((*gradients[0].shape[:-1], 0), jnp.float32)
    without, narrow = (None,) * len(weights), (empty,) * len(weights)
    return divided.transposed_with_adapters(
        chosen, None, gradients, weights, without, narrow, bits=gradient_bits
    )[0]


def _check_kept(x: jax.Array, kept: jax.Array | None) -> None:
    if kept is None:
        return
    if kept.dtype != x.dtype:
        raise TypeError(f"kept must be of the dtype of x, {x.dtype}, found {kept.dtype}")
    if kept.shape != x.shape:
        raise ValueError(f"kept must be of the shape of x, {x.shape}, found {kept.shape}")


def _check_adapter(weight: TernaryWeight, adapter: LowRank) -> None:
    rank = adapter.a.shape[0]
    if adapter.a.shape != (rank, weight.k) or adapter.b.shape != (rank, weight.n):
        raise ValueError(
            f"an adapter of an [{weight.n}, {weight.k}] matrix has A [R, {weight.k}] and "
            f"B [R, {weight.n}], found {list(adapter.a.shape)} and {list(adapter.b.shape)}"
        )


def _weight(packed: jax.Array, k: int, packing: Packing) -> TernaryWeight:
    weight = TernaryWeight(packed, jnp.ones((), jnp.float32), None, k, packing)
    weight.check()
    return weight


def _resolved(
    chosen: Implementation, product: Product, rows: jax.Array, weight: TernaryWeight
) -> Implementation:
    """What runs a product of ``rows`` [..., K] or [..., N]."""
    return resolve(chosen, product, rows.size // max(rows.shape[-1], 1), weight)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _float_matmul(chosen: Implementation, x: jax.Array, weight: TernaryWeight) -> jax.Array:
    return divided.matmul(_resolved(chosen, "linear_transposed", x, weight), x, weight)


def _float_matmul_fwd(
    chosen: Implementation, x: jax.Array, weight: TernaryWeight
) -> tuple[jax.Array, TernaryWeight]:
    return _float_matmul(chosen, x, weight), weight


def _float_matmul_bwd(
    chosen: Implementation, weight: TernaryWeight, g: jax.Array
) -> tuple[jax.Array, TernaryWeight]:
    return _float_transposed(chosen, g, weight), no_gradient(weight)


_float_matmul.defvjp(_float_matmul_fwd, _float_matmul_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _float_transposed(chosen: Implementation, g: jax.Array, weight: TernaryWeight) -> jax.Array:
    name = _resolved(chosen, "linear_transposed", g, weight)
    return divided.matmul_transposed(name, g, weight)


def _float_transposed_fwd(
    chosen: Implementation, g: jax.Array, weight: TernaryWeight
) -> tuple[jax.Array, TernaryWeight]:
    return _float_transposed(chosen, g, weight), weight


def _float_transposed_bwd(
    chosen: Implementation, weight: TernaryWeight, h: jax.Array
) -> tuple[jax.Array, TernaryWeight]:
    return _float_matmul(chosen, h, weight), no_gradient(weight)


_float_transposed.defvjp(_float_transposed_fwd, _float_transposed_bwd)

_Adapters = tuple[LowRank | None, ...]
_Weights = tuple[TernaryWeight, ...]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(chosen: Implementation, x: jax.Array, weights: _Weights) -> tuple[jax.Array, ...]:
    return divided.linear(_resolved(chosen, "linear", x, weights[0]), x, weights)


def _linear_fwd(
    chosen: Implementation, x: jax.Array, weights: _Weights
) -> tuple[tuple[jax.Array, ...], _Weights]:
    return _linear(chosen, x, weights), weights


def _linear_bwd(
    chosen: Implementation, weights: _Weights, gradients: tuple[jax.Array, ...]
) -> tuple[jax.Array, _Weights]:
    name = _resolved(chosen, "linear_transposed", gradients[0], weights[0])
    dx = divided.linear_transposed(name, gradients, weights)
    return dx, tuple(no_gradient(weight) for weight in weights)


_linear.defvjp(_linear_fwd, _linear_bwd)


def _fuses(chosen: Implementation, x: jax.Array, weight: TernaryWeight) -> bool:
    """Whether the kernel for few tokens runs, which gates and normalises by itself."""
    if _resolved(chosen, "linear", x, weight) != "triton":
        return False
    rows = x.size // max(x.shape[-1], 1)
    return cast(Any, products("triton")).fuses_prologue(rows, weight)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_after(
    chosen: Implementation,
    x: jax.Array,
    prologue: Prologue,
    residual: jax.Array | None,
    weights: _Weights,
) -> tuple[jax.Array, ...]:
    del chosen
    return divided.linear_after(x, weights, prologue, residual)


def _linear_after_fwd(
    chosen: Implementation,
    x: jax.Array,
    prologue: Prologue,
    residual: jax.Array | None,
    weights: _Weights,
) -> tuple[tuple[jax.Array, ...], tuple[Any, ...]]:
    inputs = (x, prologue, residual, weights)
    return _linear_after(chosen, *inputs), inputs


def _linear_after_bwd(
    chosen: Implementation, residuals: tuple[Any, ...], gradients: tuple[jax.Array, ...]
) -> tuple[jax.Array, Prologue, jax.Array | None, _Weights]:
    """The gradient of the same step by step."""
    x, prologue, residual, weights = residuals

    def steps(x: jax.Array, prologue: Prologue) -> tuple[jax.Array, ...]:
        alone = prologue.of_layer(weights[0].layer)
        return _linear(chosen, apply_prologue(x, alone, implementation="xla"), weights)

    dx, d_prologue = jax.vjp(steps, x, prologue)[1](gradients)
    d_residual = None if residual is None else gradients[0]
    return dx, d_prologue, d_residual, tuple(no_gradient(weight) for weight in weights)


_linear_after.defvjp(_linear_after_fwd, _linear_after_bwd)


_How = tuple[Implementation, GradientBits]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _adapted_linear(
    how: _How,
    x: jax.Array,
    kept: jax.Array | None,
    weights: _Weights,
    adapters: _Adapters,
) -> tuple[jax.Array, ...]:
    del kept
    name = _resolved(how[0], "linear", x, weights[0])
    return divided.linear_with_adapters(name, x, weights, adapters)[0]


_Residuals = tuple[jax.Array | None, jax.Array | None, _Weights, _Adapters, tuple[jax.Array, ...]]


def _adapted_linear_fwd(
    how: _How,
    x: jax.Array,
    kept: jax.Array | None,
    weights: _Weights,
    adapters: _Adapters,
) -> tuple[tuple[jax.Array, ...], _Residuals]:
    name = _resolved(how[0], "linear", x, weights[0])
    outputs, narrow = divided.linear_with_adapters(name, x, weights, adapters)
    # Kept under a name of their own, the narrow products spare a rematerialised backward pass the
    # whole call: they are R floats a token.
    narrow = tuple(checkpoint_name(u, NARROW_PRODUCT) for u in narrow)
    read = x if kept is None else kept
    if all(adapter is None for adapter in adapters):
        read = read[..., :0]  # of no use in the backward pass, but for its dtype
    own, other = (read, None) if kept is None else (None, read)
    return outputs, (own, other, weights, adapters, narrow)


def _adapted_linear_bwd(
    how: _How, residuals: _Residuals, gradients: tuple[jax.Array, ...]
) -> tuple[jax.Array | None, jax.Array | None, _Weights, _Adapters]:
    x, kept, weights, adapters, narrow = residuals
    read = kept if x is None else x
    assert read is not None
    some = any(adapter is not None for adapter in adapters)
    name = _resolved(how[0], "linear_transposed", gradients[0], weights[0])
    dx, pairs = divided.transposed_with_adapters(
        name, read if some else None, gradients, weights, adapters, narrow, bits=how[1]
    )
    frozen = tuple(no_gradient(weight) for weight in weights)
    own, other = (dx, None) if kept is None else (None, dx)
    return own, other, frozen, adapter_gradients(adapters, pairs)


_adapted_linear.defvjp(_adapted_linear_fwd, _adapted_linear_bwd)
