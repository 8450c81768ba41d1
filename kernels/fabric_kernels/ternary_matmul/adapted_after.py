"""A norm, BitNet's linears and their adapters as one operation with one gradient rule.

A kernel that normalises a row has all that the quantiser needs of it: with many tokens on Hopper
the two are one launch (``mosaic_gpu_after``), and the backward pass adds up the gradients of what
else reads the input where that of the norm is computed.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import jax
from jax.ad_checkpoint import checkpoint_name

from fabric_kernels.low_rank import NARROW_PRODUCT, LowRank
from fabric_kernels.norm import on_triton
from fabric_kernels.norm import triton as norms
from fabric_kernels.ternary_matmul import divided
from fabric_kernels.ternary_matmul.prologue import Prologue
from fabric_kernels.ternary_matmul.select import (
    Implementation,
    products_after_norms,
    resolve,
    select_implementation,
)
from fabric_kernels.ternary_matmul.weight import TernaryWeight, no_gradient

_Weights = tuple[TernaryWeight, ...]
_Adapters = tuple[LowRank | None, ...]


def normalises(
    x: jax.Array,
    prologue: Prologue,
    weights: Sequence[TernaryWeight],
    implementation: Implementation | None,
) -> bool:
    """Whether :func:`adapted_after` is for a call with these arguments.

    Norms beside a named implementation are plain jax, so it is not.
    """
    rows = x.size // max(x.shape[-1], 1)
    if implementation is not None or not on_triton(x):
        return False
    chosen = select_implementation(None)
    if any(resolve(chosen, "linear", rows, weight) != "mosaic_gpu" for weight in weights):
        return False
    return products_after_norms().takes(x, prologue, weights)


def adapted_after(
    x: jax.Array,
    prologue: Prologue,
    weights: Sequence[TernaryWeight],
    adapters: Sequence[LowRank | None],
    *,
    beside: bool = False,
) -> tuple[jax.Array, ...]:
    """``ternary_linear`` of these, where :func:`normalises`.

    With ``beside`` the last of the results is ``x``, for what else reads it.
    """
    found = _adapted_after(beside, x, prologue, tuple(weights), tuple(adapters))
    return cast(tuple[jax.Array, ...], found)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _adapted_after(
    beside: bool, x: jax.Array, prologue: Prologue, weights: _Weights, adapters: _Adapters
) -> tuple[jax.Array, ...]:
    return _forward(beside, x, prologue, weights, adapters)[0]


def _forward(
    beside: bool, x: jax.Array, prologue: Prologue, weights: _Weights, adapters: _Adapters
) -> tuple[tuple[jax.Array, ...], tuple[Any, ...]]:
    found = divided.linear_with_adapters_after(x, prologue, weights, adapters)
    outputs, narrow, values = found
    narrow = tuple(checkpoint_name(u, NARROW_PRODUCT) for u in narrow)
    outputs = (*outputs, x) if beside else outputs
    return outputs, (x, prologue, weights, adapters, narrow, values)


def _backward(
    beside: bool, residuals: tuple[Any, ...], gradients: tuple[jax.Array, ...]
) -> tuple[jax.Array, Prologue, _Weights, _Adapters]:
    x, prologue, weights, adapters, narrow, values = residuals
    own = gradients[:-1] if beside else gradients
    rows = own[0].size // own[0].shape[-1]
    name = resolve(select_implementation(None), "linear_transposed", rows, weights[0])
    by_values, pairs = divided.transposed_with_adapters(
        name, values, own, weights, adapters, narrow, bits=16
    )
    inputs = (x,) if prologue.gate is None else (prologue.gate, x)
    how = norms.How(prologue.activation, prologue.eps)
    more = gradients[-1:] if beside else ()
    by_inputs, by_gain = norms.gradients(how, (inputs, prologue.gain), by_values, *more)
    by_prologue = replace(prologue, gain=by_gain)
    if prologue.gate is not None:
        by_prologue = replace(by_prologue, gate=by_inputs[0])
    frozen = tuple(no_gradient(weight) for weight in weights)
    return by_inputs[-1], by_prologue, frozen, adapter_gradients(adapters, pairs)


_adapted_after.defvjp(_forward, _backward)


def adapter_gradients(
    adapters: _Adapters, pairs: Sequence[tuple[jax.Array, jax.Array] | None]
) -> _Adapters:
    """Float32 gradients of A and B in the dtypes of the adapters."""
    return tuple(
        None
        if adapter is None or pair is None
        else LowRank(
            pair[0].astype(adapter.a.dtype), pair[1].astype(adapter.b.dtype), adapter.scale
        )
        for adapter, pair in zip(adapters, pairs, strict=True)
    )
