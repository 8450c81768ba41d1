"""Gate, RMS norm and quantiser of a row in one launch, and their gradient in another (Triton).

XLA takes three passes over an array forward, for the sum of squares, the largest magnitude and the
codes, and two backward; a program here has a row in registers.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from fabric_kernels.absmax import EPSILON
from fabric_kernels.norm.triton import How
from fabric_kernels.norm.triton_kernels import activation
from fabric_kernels.ternary_matmul.triton_quantize import reciprocal, round_product
from fabric_kernels.triton_call import Mode

Ref = Any
PROGRAMS = 132 * 8
"""Of a gradient, each with its own sum of the gradients by gains: as many as an H100 holds."""


def codes(
    how: How, x: jax.Array, gate: jax.Array | None, gain: jax.Array, *, mode: Mode
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes int8 [M, K] of ``norm(act(gate) · x)``, their scale [M] and ``1 / rms`` [M], float32.

    Args:
        how: activation and epsilon.
        x: floats [M, K].
        gate: of the shape and dtype of ``x``, where there is an activation.
        gain: float32 [K].
        mode: what runs it.
    """
    m, k = x.shape
    block = _block(k)
    operands = [x, gain] if gate is None else [x, gain, gate]

    def kernel(*refs: Ref) -> None:
        inputs, (codes, scales, inverses) = refs[: len(operands)], refs[len(operands) :]
        token = pl.program_id(0)
        inside = _inside(k, block)
        product = _row(inputs[0], token, inside)
        if gate is not None:
            product = activation(how, _row(inputs[2], token, inside))[0] * product
        inverse = lax.rsqrt(jnp.sum(product * product) / k + how.eps)
        gains = _load(inputs[1].at[pl.ds(0, block)], inside).astype(x.dtype)
        # As rms_norm: rounded to the dtype of x before the gain and after it.
        value = (product * inverse).astype(x.dtype).astype(jnp.float32) * gains.astype(jnp.float32)
        value = value.astype(x.dtype).astype(jnp.float32)
        scale = reciprocal(jnp.maximum(jnp.max(jnp.abs(value)), EPSILON), mode) * 127.0
        rounded = jnp.clip(round_product(value, scale, mode), -128, 127).astype(jnp.int8)
        plgpu.store(codes.at[token, pl.ds(0, block)], rounded, mask=inside)
        # The largest of a row leaves out what is not a number: it becomes visible here.
        scales[token] = scale + jnp.sum(value * 0.0)
        inverses[token] = inverse

    vector = jax.ShapeDtypeStruct((m,), jnp.float32)
    return pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((m, k), jnp.int8), vector, vector],
        grid=(m,),
        compiler_params=plgpu.CompilerParams(num_warps=_warps(block), num_stages=1),
        interpret=mode == "interpret",
        name="normalised_codes",
    )(*operands)


def gradient(
    how: How,
    d: jax.Array,
    x: jax.Array,
    gate: jax.Array | None,
    gain: jax.Array,
    inverse: jax.Array,
    *,
    mode: Mode,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Gradients by ``x``, ``gate`` and ``gain`` (float32) of what :func:`codes` quantises.

    ``d`` [M, K] is that by the normalised values, ``inverse`` what :func:`codes` returned.
    """
    m, k = x.shape
    block, programs = _block(k), min(PROGRAMS, m)
    rows = pl.cdiv(m, programs)
    operands = [x, gain, *([] if gate is None else [gate]), d, inverse]
    outputs = [jax.ShapeDtypeStruct((m, k), x.dtype)] * (1 if gate is None else 2)
    outputs.append(jax.ShapeDtypeStruct((programs, k), jnp.float32))

    def kernel(*refs: Ref) -> None:
        inputs, outs = refs[: len(operands)], refs[len(operands) :]
        inside = _inside(k, block)
        gains = _load(inputs[1].at[pl.ds(0, block)], inside).astype(x.dtype).astype(jnp.float32)
        step = partial(_gradient_row, how, inputs, outs, inside, gains, k)
        first = pl.program_id(0) * rows
        zero = jnp.zeros((block,), jnp.float32)
        total = lax.fori_loop(first, jnp.minimum(first + rows, m), step, zero)
        plgpu.store(outs[-1].at[pl.program_id(0), pl.ds(0, block)], total, mask=inside)

    found = pl.pallas_call(
        kernel,
        out_shape=outputs,
        grid=(programs,),
        compiler_params=plgpu.CompilerParams(num_warps=_warps(block), num_stages=2),
        interpret=mode == "interpret",
        name="normalised_gradient",
    )(*operands)
    return found[0], None if gate is None else found[1], jnp.sum(found[-1], axis=0)


def _gradient_row(
    how: How,
    inputs: Sequence[Ref],
    outs: Sequence[Ref],
    inside: jax.Array | None,
    gains: jax.Array,
    k: int,
    token: jax.Array,
    total: jax.Array,
) -> jax.Array:
    """Stores a row's gradients; adds its share of that by the gains."""
    x, d = _row(inputs[0], token, inside), _row(inputs[-2], token, inside)
    inverse = inputs[-1][token]
    gated = None if how.activation is None else activation(how, _row(inputs[2], token, inside))
    product = x if gated is None else gated[0] * x
    normal = product * inverse
    pulled = d * gains
    d_product = inverse * (pulled - normal * (jnp.sum(pulled * normal) / k))
    results = [d_product]
    if gated is not None:
        results = [d_product * gated[0], d_product * x * gated[1]]
    for out, value in zip(outs, results, strict=False):
        at = out.at[token, pl.ds(0, value.shape[0])]
        plgpu.store(at, value.astype(out.dtype), mask=inside)
    return total + d * normal


def _row(ref: Ref, token: jax.Array, inside: jax.Array | None) -> jax.Array:
    block = _block(ref.shape[1])
    return _load(ref.at[token, pl.ds(0, block)], inside).astype(jnp.float32)


def _load(ref: Ref, inside: jax.Array | None) -> jax.Array:
    other = None if inside is None else jnp.zeros((), ref.dtype)
    return plgpu.load(ref, mask=inside, other=other)


def _inside(k: int, block: int) -> jax.Array | None:
    return None if k == block else lax.iota(jnp.int32, block) < k


def _block(k: int) -> int:
    return 1 << (k - 1).bit_length()


def _warps(block: int) -> int:
    return min(16, max(4, block // 512))
