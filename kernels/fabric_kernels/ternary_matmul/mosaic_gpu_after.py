"""Products of ``mosaic_gpu`` of a norm, which is quantised in its own launch (Triton)."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl

from fabric_kernels.low_rank import LowRank
from fabric_kernels.norm.triton import MOST_COLUMNS, How, wide_gain
from fabric_kernels.ternary_matmul.mosaic_gpu import codes_shape, of_quantized
from fabric_kernels.ternary_matmul.prologue import Prologue
from fabric_kernels.ternary_matmul.triton_group import MANY_TOKENS, narrow_of_all, small_adapters
from fabric_kernels.ternary_matmul.triton_layout import stack_of
from fabric_kernels.ternary_matmul.weight import TernaryWeight
from fabric_kernels.triton_call import Mode, kernel_module, on_platform

KERNELS = "fabric_kernels.norm.triton_codes"


def takes(x: jax.Array, prologue: Prologue, weights: Sequence[TernaryWeight]) -> bool:
    """Whether the launch is for these: many tokens of bfloat16, a norm, codes without wide pads."""
    gain, (k, rows) = prologue.gain, (x.shape[-1], x.size // max(x.shape[-1], 1))
    if gain is None or gain.ndim != 1 or x.dtype.name != "bfloat16" or k > MOST_COLUMNS:
        return False
    packed = all(weight.packing == "ternary2" for weight in weights)
    fits = packed and codes_shape(rows, weights)[1] <= pl.next_power_of_2(k)
    return fits and rows >= MANY_TOKENS


def linear_with_adapters_after(
    x: jax.Array,
    prologue: Prologue,
    weights: Sequence[TernaryWeight],
    adapters: Sequence[LowRank | None],
    *,
    interpret: Any = None,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...], jax.Array]:
    """``linear_with_adapters`` of ``norm(act(gate) · x)``, and these values; see :func:`takes`."""
    own, leading = tuple(adapters), x.shape[:-1]
    shape = codes_shape(x.size // x.shape[-1], weights)
    inputs = (x,) if prologue.gate is None else (prologue.gate, x)
    flat = tuple(a.reshape(-1, a.shape[-1]) for a in inputs)
    scales = [stack_of(weight)[1:] for weight in weights]

    def call(flat: Any, gain: jax.Array, scales: Any, *, mode: Mode) -> Any:
        how = How(prologue.activation, prologue.eps)
        return kernel_module(KERNELS).forward(how, flat, gain, scales, shape, mode=mode)

    assert prologue.gain is not None, "takes has said so"
    rows, codes, factors = on_platform(call, flat, wide_gain(prologue.gain), scales)
    narrow = narrow_of_all(rows, [one for one in small_adapters(own) if one is not None])
    quantized = (codes, factors, narrow)
    outputs, kept = of_quantized(rows, quantized, weights, own, rows.dtype, interpret=interpret)
    return (
        tuple(y.reshape(*leading, y.shape[-1]) for y in outputs),
        tuple(u.reshape(*leading, u.shape[-1]) for u in kept),
        rows.reshape(x.shape),
    )
