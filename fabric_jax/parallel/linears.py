"""Products with packed weights that are cut along a mesh; called within ``shard_map``.

Activations are whole on every device of the axis ``tensor``, matrices are not. Where the outputs of
a matrix are cut, each device computes its own and all are gathered; where the inputs are cut, each
takes its share of the channels, quantises it with the absmax of all (``pmax``), and the exact int32
sums are added (``psum``). So the outputs are those of one device, bit for bit. What is cut along
``fsdp`` is gathered as bytes, one layer's matrices at a time, forward and once more backward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import jax
from fabric_kernels import (
    LowRank,
    TernaryWeight,
    absmax_quantize,
    low_rank_product,
    scale_sums,
    ternary_linear,
    ternary_matmul,
    with_gradient_of,
)
from fabric_kernels.ternary_matmul import (
    GradientBits,
    Implementation,
    no_gradient,
    ternary_linear_transposed,
)
from fabric_kernels.ternary_matmul.input_parts import codes_per_byte, own_inputs, whole_inputs
from jax import lax

from fabric_jax.parallel.axes import Cut
from fabric_jax.parallel.mesh import FSDP, TENSOR
from fabric_jax.quantization.absmax import ActQuant
from fabric_jax.quantization.packed_linear import packed_linears


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What products with a group of matrices that share their input have in common.

    Attributes:
        cuts: of each matrix.
        tensor: devices along the axis ``tensor``.
        act_quant: quantiser of the input.
        implementation: which ``ternary_matmul`` runs; None picks.
        gradient_bits: of the backward product on CPU.
    """

    cuts: tuple[Cut, ...]
    tensor: int
    act_quant: ActQuant = "per_token"
    implementation: Implementation | None = None
    gradient_bits: GradientBits = 16


def partitioned_linears(
    plan: Plan,
    x: jax.Array,
    weights: Sequence[TernaryWeight],
    adapters: Sequence[LowRank | None],
    *,
    kept: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """``packed_linears`` where ``weights`` hold this device's parts, and K of the whole.

    Args:
        plan: how the weights are cut.
        x: [..., K], this device's rows; the same on all devices of the axis ``tensor``.
        weights: this device's parts.
        adapters: whole; each device computes their products with its own rows.
        kept: see ``packed_linears``.
    """
    base_input = x if kept is None else with_gradient_of(x, kept)
    outputs = cast(tuple[jax.Array, ...], _products(plan, base_input, tuple(weights)))
    return tuple(
        y if adapter is None else y + low_rank_product(x, adapter, kept=kept)
        for y, adapter in zip(outputs, adapters, strict=True)
    )


_Weights = tuple[TernaryWeight, ...]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _products(plan: Plan, x: jax.Array, weights: _Weights) -> tuple[jax.Array, ...]:
    whole = [_gathered(plan, w, cut) for w, cut in zip(weights, plan.cuts, strict=True)]
    if plan.act_quant != "per_token":
        return _other_quantizer(plan, x, whole)
    if plan.cuts[0].inputs == TENSOR:
        return tuple(_by_inputs(plan, x, weight) for weight in whole)
    parts = ternary_linear(x, whole, implementation=plan.implementation)
    return tuple(
        lax.all_gather(y, TENSOR, axis=y.ndim - 1, tiled=True) if cut.outputs == TENSOR else y
        for y, cut in zip(parts, plan.cuts, strict=True)
    )


def _products_fwd(
    plan: Plan, x: jax.Array, weights: _Weights
) -> tuple[tuple[jax.Array, ...], _Weights]:
    # The parts are kept for the backward pass, not what is gathered of them.
    return _products(plan, x, weights), weights


def _products_bwd(
    plan: Plan, weights: _Weights, gradients: tuple[jax.Array, ...]
) -> tuple[jax.Array, _Weights]:
    whole = [_gathered(plan, w, cut) for w, cut in zip(weights, plan.cuts, strict=True)]
    frozen = tuple(no_gradient(weight) for weight in weights)
    back = partial(
        ternary_linear_transposed,
        implementation=plan.implementation,
        gradient_bits=plan.gradient_bits if plan.act_quant == "per_token" else 24,
    )
    if plan.act_quant != "per_token":
        return back(gradients, whole), frozen
    if plan.cuts[0].inputs == TENSOR:
        (weight,) = whole
        return whole_inputs(back(gradients, whole), weights[0].k, weight.packing, TENSOR), frozen
    parts: list[jax.Array] = []
    if cut := [i for i, one in enumerate(plan.cuts) if one.outputs == TENSOR]:
        own = [_own_outputs(plan, gradients[i]) for i in cut]
        parts.append(lax.psum(back(own, [whole[i] for i in cut]), TENSOR))
    if uncut := [i for i, one in enumerate(plan.cuts) if one.outputs != TENSOR]:
        parts.append(back([gradients[i] for i in uncut], [whole[i] for i in uncut]))
    return sum(parts[1:], parts[0]), frozen


_products.defvjp(_products_fwd, _products_bwd)


def _gathered(plan: Plan, weight: TernaryWeight, cut: Cut) -> TernaryWeight:
    """The part of a matrix that this device multiplies by, of one layer.

    What is not cut along ``fsdp`` is read where it lies.
    """
    names = {FSDP} if plan.act_quant == "per_token" else {FSDP, TENSOR}
    if not names & set(cut.axes):
        packed = weight.packed
    else:
        weight = weight.single()
        packed = weight.packed
        for axis, name in enumerate(cut.axes):
            if name in names:
                packed = lax.all_gather(packed, name, axis=axis, tiled=True)
    k = weight.k
    if cut.inputs == TENSOR and TENSOR not in names:
        k = packed.shape[-1] * codes_per_byte(weight.packing)
    return TernaryWeight(packed, weight.scale, weight.layer, k, weight.packing)


def _by_inputs(plan: Plan, x: jax.Array, weight: TernaryWeight) -> jax.Array:
    """``scale · (q(x) · codes^T)`` where the device has some of the inputs."""
    codes, act_scale = absmax_quantize(_own_inputs(plan, x, weight), TENSOR)
    one = weight.single()
    sums = ternary_matmul(
        codes, one.packed, packing=one.packing, implementation=plan.implementation
    )
    return scale_sums(lax.psum(sums, TENSOR), act_scale, one.scale).astype(x.dtype)


def _own_inputs(plan: Plan, x: jax.Array, weight: TernaryWeight) -> jax.Array:
    """The channels of ``x`` [..., K] whose codes this device's bytes hold; zeros beyond K."""
    return own_inputs(x, weight.packed.shape[-1], weight.packing, TENSOR, plan.tensor)


def _own_outputs(plan: Plan, y: jax.Array) -> jax.Array:
    """This device's part of the last axis."""
    size = y.shape[-1] // plan.tensor
    return lax.dynamic_slice_in_dim(y, lax.axis_index(TENSOR) * size, size, y.ndim - 1)


def _other_quantizer(
    plan: Plan, x: jax.Array, weights: Sequence[TernaryWeight]
) -> tuple[jax.Array, ...]:
    """Float products with whole matrices: their sums would depend on where they are cut."""
    return packed_linears(x, weights, act_quant=plan.act_quant, implementation=plan.implementation)
