"""Each product of ``select.Products``, and what a device does of it with parts of the matrices.

Arguments and results are those of the implementations; the first argument names one.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax import lax

from fabric_kernels.absmax import absmax_quantize, scale_sums
from fabric_kernels.low_rank import LowRank, contract_with
from fabric_kernels.ternary_matmul import xla
from fabric_kernels.ternary_matmul.cuts import Cut, Geometry
from fabric_kernels.ternary_matmul.input_parts import codes_per_byte, own_inputs, whole_inputs
from fabric_kernels.ternary_matmul.partitioning import Divisible, divided
from fabric_kernels.ternary_matmul.prologue import Prologue, apply_prologue
from fabric_kernels.ternary_matmul.select import (
    Implementation,
    products,
    products_after_norms,
    products_with_adapters,
)
from fabric_kernels.ternary_matmul.weight import TernaryWeight

_Adapters = Sequence[LowRank | None]
_Pairs = list[tuple[jax.Array, jax.Array] | None]


def matmul(name: Implementation, x: jax.Array, weight: TernaryWeight) -> jax.Array:
    """``x[..., k] · codes^T``: int32 for int8 ``x``, else in the dtype of ``x``."""

    def run(cut: Cut | None, x: jax.Array, weight: TernaryWeight) -> jax.Array:
        multiply = products(name).matmul
        if cut is None or not cut.inputs:
            return multiply(x, weight)
        y = multiply(_own(cut, x), _part(cut, weight))
        return _summed(y, cut.inputs)

    return divided(
        Divisible(
            run=run,
            labels=("... k", _labels(weight, 0)),
            results=("... n0",),
            geometry=Geometry.of(weight),
            matrices=1,
        ),
        x,
        weight,
    )


def linear(
    name: Implementation, x: jax.Array, weights: Sequence[TernaryWeight]
) -> tuple[jax.Array, ...]:
    """``scale · (q(x) · codes^T)`` for each weight, in the dtype of ``x``."""

    def run(
        cut: Cut | None, x: jax.Array, weights: tuple[TernaryWeight, ...]
    ) -> tuple[jax.Array, ...]:
        if cut is None or not cut.inputs:
            return tuple(products(name).linear(x, weights))
        return _by_inputs(name, cut, _own(cut, x), weights, x.dtype)

    return divided(
        Divisible(
            run=run,
            labels=("... k", _all_labels(weights)),
            results=_outputs(weights),
            geometry=Geometry.of(weights[0]),
            matrices=len(weights),
        ),
        x,
        tuple(weights),
    )


def linear_with_adapters(
    name: Implementation,
    x: jax.Array,
    weights: Sequence[TernaryWeight],
    adapters: _Adapters,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """``linear`` with the adapters' products added, and what the backward pass reads."""

    def run(
        cut: Cut | None, x: jax.Array, fixed: tuple[tuple[TernaryWeight, ...], _Adapters]
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        weights, adapters = fixed
        module = products_with_adapters(name)
        if cut is None or not cut.inputs:
            outputs, narrow = module.linear_with_adapters(x, weights, adapters)
            return tuple(outputs), tuple(narrow)
        return _adapted_by_inputs(name, cut, _own(cut, x), weights, adapters)

    labels = (_all_labels(weights), _adapter_labels(adapters))
    return divided(
        Divisible(
            run=run,
            labels=("... k", labels),
            results=_outputs(weights),
            geometry=Geometry.of(weights[0]),
            matrices=len(weights),
        ),
        x,
        (tuple(weights), tuple(adapters)),
    )


def linear_with_adapters_after(
    x: jax.Array,
    prologue: Prologue,
    weights: Sequence[TernaryWeight],
    adapters: _Adapters,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...], jax.Array]:
    """``linear_with_adapters`` of ``mosaic_gpu`` of ``norm(act(gate) · x)``, and these values.

    A norm reads all channels; what a device has of the values is that of all of them.
    """
    activation, eps = prologue.activation, prologue.eps

    def run(cut: Cut | None, rows: Any, fixed: Any) -> Any:
        (x, gate), (weights, adapters, gain) = rows, fixed
        before = Prologue(gate=gate, gain=gain, activation=activation, eps=eps)
        if cut is None or not cut.inputs:
            run_there = products_after_norms().linear_with_adapters_after
            return run_there(x, before, weights, adapters)
        values = apply_prologue(x, before, implementation=None)
        outputs, narrow = _adapted_by_inputs(
            "mosaic_gpu", cut, _slice(cut, values), weights, adapters
        )
        return outputs, narrow, values

    return divided(
        Divisible(
            run=run,
            labels=(
                ("... channel", (prologue.gate is not None and "... channel") or None),
                (_all_labels(weights), _adapter_labels(adapters), "channel"),
            ),
            results=_outputs(weights),
            geometry=Geometry.of(weights[0]),
            matrices=len(weights),
        ),
        (x, prologue.gate),
        (tuple(weights), tuple(adapters), prologue.gain),
    )


def linear_after(
    x: jax.Array,
    weights: Sequence[TernaryWeight],
    prologue: Prologue,
    residual: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """``residual + linear(norm(act(gate) · x))`` of Triton; a norm reads all channels."""
    activation, eps = prologue.activation, prologue.eps

    def run(cut: Cut | None, rows: Any, fixed: Any) -> tuple[jax.Array, ...]:
        x, gate, residual = rows
        weights, gain = fixed
        before = Prologue(gate=gate, gain=gain, activation=activation, eps=eps)
        if cut is None or not cut.inputs:
            call = cast(Any, products("triton")).linear_after
            return tuple(call(x, weights, before, residual))
        before = before.of_layer(weights[0].layer)
        x = apply_prologue(x, before, implementation="xla")
        outputs = _by_inputs("triton", cut, _slice(cut, x), weights, x.dtype)
        return outputs if residual is None else (residual + outputs[0],)

    gain = prologue.gain
    of_gain = None if gain is None else ("channel" if gain.ndim == 1 else "l channel")
    of_rows = ("... channel", (prologue.gate is not None and "... channel") or None)
    return divided(
        Divisible(
            run=run,
            labels=(
                (*of_rows, None if residual is None else "... n0"),
                (_all_labels(weights), of_gain),
            ),
            results=_outputs(weights),
            geometry=Geometry.of(weights[0]),
            matrices=len(weights),
        ),
        (x, prologue.gate, residual),
        (tuple(weights), gain),
    )


def matmul_transposed(name: Implementation, g: jax.Array, weight: TernaryWeight) -> jax.Array:
    """``g[..., n] · codes`` in the dtype of ``g``."""

    def run(cut: Cut | None, g: jax.Array, weight: TernaryWeight) -> jax.Array:
        multiply = products(name).matmul_transposed
        if cut is None:
            return multiply(g, weight)
        return _of_all_outputs(cut, multiply(g, _part(cut, weight)))

    return divided(
        Divisible(
            run=run,
            labels=("... n0", _labels(weight, 0)),
            results=("... k",),
            geometry=Geometry.of(weight),
            matrices=1,
        ),
        g,
        weight,
    )


def linear_transposed(
    name: Implementation, gradients: Sequence[jax.Array], weights: Sequence[TernaryWeight]
) -> jax.Array:
    """``sum scale · (g · codes)`` in the dtype of the first gradient."""

    def run(
        cut: Cut | None, gradients: tuple[jax.Array, ...], weights: tuple[TernaryWeight, ...]
    ) -> jax.Array:
        multiply = products(name).linear_transposed
        if cut is None:
            return multiply(gradients, weights)
        parts = tuple(_part(cut, weight) for weight in weights)
        return _of_all_outputs(cut, multiply(_counted_once(cut, gradients), parts))

    return divided(
        Divisible(
            run=run,
            labels=(_outputs(weights), _all_labels(weights)),
            results=("... k",),
            geometry=Geometry.of(weights[0]),
            matrices=len(weights),
        ),
        tuple(gradients),
        tuple(weights),
    )


def transposed_with_adapters(
    name: Implementation,
    x: jax.Array | None,
    gradients: Sequence[jax.Array],
    weights: Sequence[TernaryWeight],
    adapters: _Adapters,
    narrow: Sequence[jax.Array],
    *,
    bits: Literal[16, 24],
) -> tuple[jax.Array, _Pairs]:
    """The gradients by ``x``, and by A and B in float32, None where there is no adapter.

    ``x`` is None where there are no adapters. ``xla``, which a table may choose, has the products
    alone; what adapters add is Triton's then.
    """

    def run(cut: Cut | None, rows: Any, fixed: Any) -> tuple[jax.Array, _Pairs]:
        x, gradients, narrow = rows
        weights, adapters = fixed
        if cut is not None:
            weights = tuple(_part(cut, weight) for weight in weights)
            gradients = _counted_once(cut, gradients)
            x = None if x is None else _own(cut, x)
            adapters = tuple(None if a is None else _own_adapter(cut, a) for a in adapters)
        dx, pairs = _local_gradients(name, bits, (x, gradients, narrow), weights, adapters)
        if cut is None:
            return dx, pairs
        shared = [
            None if pair is None else _whole_pair(cut, i, pair) for i, pair in enumerate(pairs)
        ]
        return _of_all_outputs(cut, dx), shared

    of_narrow = tuple(f"... kept{i}" for i in range(len(narrow)))
    of_pairs = [
        label
        for i, adapter in enumerate(adapters)
        if adapter is not None
        for label in (f"r{i} k", f"r{i} n{i}")
    ]
    return divided(
        Divisible(
            run=run,
            labels=(
                (None if x is None else "... k", _outputs(weights), of_narrow),
                (_all_labels(weights), _adapter_labels(adapters)),
            ),
            results=("... k", *of_pairs),
            geometry=Geometry.of(weights[0]),
            matrices=len(weights),
            sums_rows=bool(of_pairs),
        ),
        (x, tuple(gradients), tuple(narrow)),
        (tuple(weights), tuple(adapters)),
    )


# ---- what a device does ------------------------------------------------------------------------


def _by_inputs(
    name: Implementation,
    cut: Cut,
    own: jax.Array,
    weights: Sequence[TernaryWeight],
    dtype: Any,
) -> tuple[jax.Array, ...]:
    """``linear`` of this device's channels, the sums of all devices scaled."""
    codes, act_scale = absmax_quantize(own, cut.inputs)
    sums = [products(name).matmul(codes, _part(cut, weight)) for weight in weights]
    return tuple(
        scale_sums(total, act_scale, weight.single().scale).astype(dtype)
        for total, weight in zip(lax.psum(sums, cut.inputs), weights, strict=True)
    )


def _adapted_by_inputs(
    name: Implementation,
    cut: Cut,
    own: jax.Array,
    weights: Sequence[TernaryWeight],
    adapters: _Adapters,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """``linear_with_adapters`` of this device's channels."""
    outputs = _by_inputs(name, cut, own, weights, own.dtype)
    products_with_a = [_narrow(cut, own, adapter) for adapter in adapters]
    outputs = tuple(
        y if adapter is None or u is None else y + contract_with(u, adapter.b, 0)
        for y, u, adapter in zip(outputs, products_with_a, adapters, strict=True)
    )
    return outputs, tuple(products_with_adapters(name).kept_narrow(own, products_with_a))


def _local_gradients(
    name: Implementation,
    bits: Literal[16, 24],
    rows: Any,
    weights: Sequence[TernaryWeight],
    adapters: _Adapters,
) -> tuple[jax.Array, _Pairs]:
    x, gradients, narrow = rows
    extra = {"products": xla.unscaled_transposed(gradients, weights)} if name == "xla" else {}
    run = products_with_adapters("triton" if name == "xla" else name).transposed_with_adapters
    if x is None:  # of no use, but for its dtype
        x = jnp.zeros((*gradients[0].shape[:-1], 0), gradients[0].dtype)
    dx, pairs = run(x, gradients, weights, adapters, narrow, bits=bits, **extra)
    return dx, [
        None if adapter is None else pair for pair, adapter in zip(pairs, adapters, strict=True)
    ]


def _narrow(cut: Cut, own: jax.Array, adapter: LowRank | None) -> jax.Array | None:
    """``scale · x A^T`` [..., R] of all channels."""
    if adapter is None:
        return None
    part = contract_with(own, _own_adapter(cut, adapter).a, 1)
    return _summed(part, cut.inputs) * jnp.asarray(adapter.scale, own.dtype)


def _part(cut: Cut, weight: TernaryWeight) -> TernaryWeight:
    """This device's part, with the K that it holds."""
    if not cut.inputs:
        return weight
    return replace(weight, k=weight.packed.shape[-1] * codes_per_byte(weight.packing))


def _own(cut: Cut, x: jax.Array) -> jax.Array:
    """This device's channels of what is cut like them where that is possible, else whole."""
    return x if not cut.inputs or cut.geometry.contiguous else _slice(cut, x)


def _slice(cut: Cut, x: jax.Array) -> jax.Array:
    geometry = cut.geometry
    width = geometry.width // cut.parts
    return own_inputs(x, width, geometry.packing, cut.inputs, cut.parts)


def _own_adapter(cut: Cut, adapter: LowRank) -> LowRank:
    return replace(adapter, a=_own(cut, adapter.a))


def _whole_channels(cut: Cut, x: jax.Array) -> jax.Array:
    """The inverse of :func:`_own`."""
    if not cut.inputs or cut.geometry.contiguous:
        return x
    return whole_inputs(x, cut.geometry.k, cut.geometry.packing, cut.inputs)


def _of_all_outputs(cut: Cut, dx: jax.Array) -> jax.Array:
    return _whole_channels(cut, _summed(dx, cut.any_outputs))


def _counted_once(cut: Cut, gradients: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Gradients that several devices have are zeros on all but one: their products are added up."""
    found: list[jax.Array] = []
    for g, own in zip(gradients, cut.outputs, strict=True):
        if again := tuple(axis for axis in cut.any_outputs if axis not in own):
            g = jnp.where(lax.axis_index(again) == 0, g, jnp.zeros_like(g))
        found.append(g)
    return tuple(found)


def _whole_pair(
    cut: Cut, number: int, pair: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The gradients by A and B of one adapter, of all rows and outputs."""
    again = tuple(axis for axis in cut.any_outputs if axis not in cut.outputs[number])
    a = _summed(pair[0], (*cut.rows, *cut.any_outputs))
    return _whole_channels(cut, a), _summed(pair[1], (*cut.rows, *again))


def _summed(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Over devices; half precision is added up in float32."""
    if not axes:
        return x
    if x.dtype == jnp.int32:
        return lax.psum(x, axes)
    return lax.psum(x.astype(jnp.float32), axes).astype(x.dtype)


# ---- labels ------------------------------------------------------------------------------------


def _labels(weight: TernaryWeight, number: int) -> Any:
    stack = weight.layer is not None
    return replace(
        cast(Any, weight),
        packed=f"{'l ' if stack else ''}n{number} w",
        scale="l" if weight.scale.ndim else "",
        layer="" if stack else None,
    )


def _all_labels(weights: Sequence[TernaryWeight]) -> tuple[Any, ...]:
    return tuple(_labels(weight, i) for i, weight in enumerate(weights))


def _adapter_labels(adapters: _Adapters) -> tuple[Any, ...]:
    return tuple(
        None if adapter is None else replace(cast(Any, adapter), a=f"r{i} k", b=f"r{i} n{i}")
        for i, adapter in enumerate(adapters)
    )


def _outputs(weights: Sequence[TernaryWeight]) -> tuple[str, ...]:
    return tuple(f"... n{i}" for i in range(len(weights)))
