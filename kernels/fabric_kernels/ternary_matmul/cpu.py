"""The CPU implementation: kernels of ``csrc`` called by XLA through its foreign function interface.

Sums are int32 and exact. A float operand (gradients; inputs that are not quantised) enters as a
fixed-point number of 16 or 24 bits a row, the row's largest magnitude being the largest number, so
that its products are exact too: what is lost is the rounding of each element to 1/32512 or 1/8.3
million of the row's largest, half a step at most.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

from fabric_kernels import cpu_library
from fabric_kernels.low_rank import LowRank
from fabric_kernels.packing import Packing
from fabric_kernels.ternary_matmul.weight import TernaryWeight

Bits = Literal[16, 24]
MAX_GROUPS = 4
FORMATS: dict[Packing, np.int32] = {"ternary2": np.int32(0), "ternary1.6": np.int32(1)}


def matmul(x: jax.Array, weight: TernaryWeight) -> jax.Array:
    """``x[..., k] · codes^T``: int32 for int8 ``x``, else in the dtype of ``x``."""
    cpu_library.load()
    if x.dtype == jnp.int8:
        return _codes(weight.packing, weight.n)(x, _layer(weight), weight.packed)
    unit = jnp.ones((), jnp.float32)
    call = _linear(weight.packing, (weight.n,), (1.0,), digits=3)
    y, _ = call(x.astype(jnp.float32), _layer(weight), ((weight.packed, unit, *_none(weight)),))
    return y[0].astype(x.dtype)


def linear_with_adapters(
    x: jax.Array, weights: Sequence[TernaryWeight], adapters: Sequence[LowRank | None]
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """``scale · (q(x) · codes^T) + adapter`` for each weight, the quantiser run once.

    Returns the outputs in x's dtype, and each adapter's ``scale · x A^T`` [..., R] in float32.
    """
    cpu_library.load()
    first = weights[0]
    call = _linear(
        first.packing, tuple(weight.n for weight in weights), _scales(adapters), digits=1
    )
    groups = tuple(
        (weight.packed, weight.scale, *_low_rank(adapter, weight))
        for weight, adapter in zip(weights, adapters, strict=True)
    )
    outputs, narrow = call(x.astype(jnp.float32), _layer(first), groups)
    return tuple(y.astype(x.dtype) for y in outputs), tuple(narrow)


def kept_narrow(x: jax.Array, narrow: Sequence[jax.Array | None]) -> tuple[jax.Array, ...]:
    """What the backward pass reads, of each adapter's ``scale · x A^T`` [..., R]."""
    none = jnp.zeros((*x.shape[:-1], 0), jnp.float32)
    return tuple(none if u is None else u.astype(jnp.float32) for u in narrow)


def matmul_transposed(g: jax.Array, weight: TernaryWeight) -> jax.Array:
    """``g[..., n] · codes`` in the dtype of ``g``."""
    cpu_library.load()
    unit = jnp.ones((), jnp.float32)
    rows = g.astype(jnp.float32)
    call = _transposed(weight.packing, weight.k, (1.0,), digits=3)
    empty = jnp.zeros((*g.shape[:-1], 0), jnp.float32)
    group = (weight.packed, unit, *_none(weight))
    dx, _ = call((empty, (rows,), (empty,)), _layer(weight), (group,))
    return dx.astype(g.dtype)


def transposed_with_adapters(
    x: jax.Array,
    gradients: Sequence[jax.Array],
    weights: Sequence[TernaryWeight],
    adapters: Sequence[LowRank | None],
    narrow: Sequence[jax.Array],
    *,
    bits: Bits,
) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
    """The gradients of :func:`linear_with_adapters`: by ``x``, and by each A and B (float32).

    ``x`` may have no channels where there are no adapters.
    """
    cpu_library.load()
    first = weights[0]
    call = _transposed(first.packing, first.k, _scales(adapters), digits=bits // 8)
    groups = tuple(
        (weight.packed, weight.scale, *_low_rank(adapter, weight))
        for weight, adapter in zip(weights, adapters, strict=True)
    )
    rows = (
        x.astype(jnp.float32),
        tuple(g.astype(jnp.float32) for g in gradients),
        tuple(narrow),
    )
    dx, pairs = call(rows, _layer(first), groups)
    return dx.astype(gradients[0].dtype), [
        (pairs[2 * i], pairs[2 * i + 1]) for i in range(len(groups))
    ]


def _scales(adapters: Sequence[LowRank | None]) -> tuple[float, ...]:
    return tuple(1.0 if adapter is None else adapter.scale for adapter in adapters)


def _low_rank(adapter: LowRank | None, weight: TernaryWeight) -> tuple[jax.Array, jax.Array]:
    if adapter is None:
        return _none(weight)
    return adapter.a.astype(jnp.float32), adapter.b.astype(jnp.float32)


def _none(weight: TernaryWeight) -> tuple[jax.Array, jax.Array]:
    """An adapter of rank 0."""
    return jnp.zeros((0, weight.k), jnp.float32), jnp.zeros((0, weight.n), jnp.float32)


def _layer(weight: TernaryWeight) -> jax.Array:
    return jnp.zeros((), jnp.int32) if weight.layer is None else weight.layer


def _codes(packing: Packing, n: int) -> Callable[..., jax.Array]:
    def call(x: jax.Array, layer: jax.Array, packed: jax.Array) -> jax.Array:
        out = jax.ShapeDtypeStruct((*x.shape[:-1], n), jnp.int32)
        return jax.ffi.ffi_call("fabric_ternary_codes", out)(
            x, layer, packed, format=FORMATS[packing]
        )

    return _rows_fold(call)


# packed, scale, A, B
Group = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _linear(
    packing: Packing, outputs: tuple[int, ...], scales: tuple[float, ...], digits: int
) -> Callable[..., tuple[list[jax.Array], list[jax.Array]]]:
    def call(
        x: jax.Array, layer: jax.Array, groups: tuple[Group, ...]
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        leading = x.shape[:-1]
        wide = [jax.ShapeDtypeStruct((*leading, n), jnp.float32) for n in outputs]
        ranks = [group[2].shape[0] for group in groups]
        narrow = [jax.ShapeDtypeStruct((*leading, r), jnp.float32) for r in ranks]
        operands = [part for group in groups for part in group]
        out = jax.ffi.ffi_call("fabric_ternary_linear", [*wide, *narrow])(
            x,
            layer,
            *operands,
            format=FORMATS[packing],
            digits=np.int32(digits),
            scales=np.array(scales, np.float32),
        )
        return list(out[: len(outputs)]), list(out[len(outputs) :])

    return _rows_fold(call)


# x, gradients, narrow products
Rows = tuple[jax.Array, tuple[jax.Array, ...], tuple[jax.Array, ...]]


def _transposed(
    packing: Packing, k: int, scales: tuple[float, ...], digits: int
) -> Callable[..., tuple[jax.Array, list[jax.Array]]]:
    def call(
        rows: Rows, layer: jax.Array, groups: tuple[Group, ...]
    ) -> tuple[jax.Array, list[jax.Array]]:
        x, gradients, narrow = rows
        dx = jax.ShapeDtypeStruct((*gradients[0].shape[:-1], k), jnp.float32)
        low_rank = [jax.ShapeDtypeStruct(m.shape, jnp.float32) for g in groups for m in g[2:]]
        operands = [
            part
            for g, group, u in zip(gradients, groups, narrow, strict=True)
            for part in (g, *group, u)
        ]
        out = jax.ffi.ffi_call("fabric_ternary_transposed", [dx, *low_rank])(
            layer,
            x,
            *operands,
            format=FORMATS[packing],
            digits=np.int32(digits),
            scales=np.array(scales, np.float32),
        )
        return out[0], list(out[1:])

    def mapped_outputs(out: tuple[jax.Array, list[jax.Array]]) -> tuple[bool, list[bool]]:
        return True, [False] * len(out[1])

    return _rows_fold(call, mapped_outputs)


def _rows_fold(
    call: Callable[..., Any], mapped_outputs: Callable[[Any], Any] | None = None
) -> Callable[..., Any]:
    """``call`` with a rule for ``vmap``: its first argument's rows may have any number of axes.

    A mapped axis of the rows is one more of those, and the call stays one. Where weights are mapped
    too, or an output is a sum over rows (``mapped_outputs`` says which outputs are not), the calls
    follow one another.
    """
    mapped = custom_vmap(call)

    def rule(size: int, batched: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
        sums = mapped_outputs is not None and any(group[2].shape[-2] for group in arguments[2])
        if sums or any(jax.tree.leaves(batched[1:])):
            out = lax.map(partial(_one_call, mapped, batched, arguments), jnp.arange(size))
            return out, jax.tree.map(lambda _: True, out)
        rows = jax.tree.map(
            lambda a, b: a if b else jnp.broadcast_to(a, (size, *a.shape)),
            arguments[0],
            batched[0],
        )
        out = mapped(rows, *arguments[1:])
        if mapped_outputs is None:
            return out, jax.tree.map(lambda _: True, out)
        return out, mapped_outputs(out)

    mapped.def_vmap(rule)
    return mapped


def _one_call(
    call: Callable[..., Any], batched: Sequence[Any], arguments: Sequence[Any], i: jax.Array
) -> Any:
    own = jax.tree.map(
        lambda a, b: lax.dynamic_index_in_dim(a, i, keepdims=False) if b else a,
        tuple(arguments),
        tuple(batched),
    )
    return call(*own)
