"""Gate, RMS norm and quantiser of a row in one launch, and their gradient in another (Triton).

XLA takes three passes over an array forward, for the sum of squares, the largest magnitude and the
codes, and two backward; a program here has whole rows in registers.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from fabric_kernels.absmax import EPSILON
from fabric_kernels.norm.triton import How
from fabric_kernels.norm.triton_kernels import activation
from fabric_kernels.norm.triton_rows import Row, choose_pieces, over_pieces, sum_products, wide
from fabric_kernels.triton_call import Mode
from fabric_kernels.triton_exact import reciprocal, round_product
from fabric_kernels.triton_programs import program_id

Ref = Any
PROGRAMS = 132 * 8
"""Of a gradient, each with its own sum of the gradients by gains: as many as an H100 holds."""
CODES_THREADS = 256
GRADIENT_THREADS = 128
"""Of a program, the fastest of 64 to 512 on an H100 for 3072 gated channels."""


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
    cut = choose_pieces(m, k, CODES_THREADS)
    operands = [x, gain] if gate is None else [x, gain, gate]

    def kernel(*refs: Ref) -> None:
        inputs, (codes, scales, inverses) = refs[: len(operands)], refs[len(operands) :]
        row = program_id(mode) * cut.rows
        product = wide(cut.load(inputs[0], row))
        if gate is not None:
            gates = wide(cut.load(inputs[2], row))
            product = [activation(how, g)[0] * x for g, x in zip(gates, product, strict=True)]
        inverse = lax.rsqrt(sum_products(product, product) / k + how.eps)
        values = _normal(product, inverse, cut.load_one(inputs[1]), x.dtype)
        rounded, scale = _quantised(values, mode)
        cut.store(codes, row, rounded)
        scales[pl.ds(row, cut.rows)] = scale
        inverses[pl.ds(row, cut.rows)] = inverse[:, 0]

    vector = jax.ShapeDtypeStruct((m,), jnp.float32)
    return pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((m, k), jnp.int8), vector, vector],
        grid=(m // cut.rows,),
        compiler_params=plgpu.CompilerParams(num_warps=cut.warps, num_stages=1),
        interpret=mode == "interpret",
        name="normalised_codes",
    )(*operands)


def _normal(product: Row, inverse: jax.Array, gains: Row, dtype: Any) -> Row:
    """As rms_norm: rounded to ``dtype`` before the gain and after it."""
    normal = [(part * inverse).astype(dtype).astype(jnp.float32) for part in product]
    gained = [
        part * gain.astype(dtype).astype(jnp.float32)
        for part, gain in zip(normal, gains, strict=True)
    ]
    return [part.astype(dtype).astype(jnp.float32) for part in gained]


def _quantised(values: Row, mode: Mode) -> tuple[Row, jax.Array]:
    """Codes, and the scale [R]."""
    largest = over_pieces(jnp.maximum, [jnp.max(jnp.abs(v), 1, keepdims=True) for v in values])
    # Triton's inline PTX is for vectors: the scale is one number for each channel.
    largest = jnp.broadcast_to(jnp.maximum(largest, EPSILON), values[0].shape)
    scale = reciprocal(largest, mode) * 127.0
    rounded = [jnp.clip(round_product(v, scale, mode), -128, 127) for v in values]
    # The largest of a row leaves out what is not a number: it becomes visible here.
    lost = over_pieces(jnp.add, [jnp.sum(v * 0.0, axis=1) for v in values])
    return rounded, jnp.max(scale, axis=1) + lost


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
    cut = choose_pieces(m, k, GRADIENT_THREADS)
    programs = min(PROGRAMS, groups := m // cut.rows)
    read = [d, x] if gate is None else [d, x, gate]
    outputs = [jax.ShapeDtypeStruct((m, k), x.dtype)] * (len(read) - 1)
    outputs.append(jax.ShapeDtypeStruct((programs * cut.rows, k), jnp.float32))

    def kernel(*refs: Ref) -> None:
        first = program_id(mode)
        inputs, (gain, inverse), outs = refs[: len(read)], refs[len(read) :][:2], refs[-len(read) :]
        gains = [own.astype(x.dtype).astype(jnp.float32) for own in cut.load_one(gain)]

        def fetch(group: jax.Array) -> list[Row]:
            return [cut.load(ref, group * cut.rows) for ref in inputs]

        def step(i: jax.Array, carry: tuple[list[Row], Row]) -> tuple[list[Row], Row]:
            # What the next turn needs is under way while this one computes.
            (now, totals), group = carry, first + i * programs
            following = fetch(jnp.minimum(group + programs, groups - 1))
            own = inverse[pl.ds(row := group * cut.rows, cut.rows)][:, None]
            results, shares = _gradients(how, [wide(part) for part in now], gains, own, k)
            for out, values in zip(outs[:-1], results, strict=True):
                cut.store(out, row, values)
            return following, [a + b for a, b in zip(totals, shares, strict=True)]

        zeros = [jnp.zeros((cut.rows, cut.size), jnp.float32) for _ in cut]
        turns = lax.div(groups - 1 - first, programs) + 1
        _, totals = lax.fori_loop(0, turns, step, (fetch(first), zeros))
        cut.store(outs[-1], first * cut.rows, totals)

    found = pl.pallas_call(
        kernel,
        out_shape=outputs,
        grid=(programs,),
        compiler_params=plgpu.CompilerParams(num_warps=cut.warps, num_stages=1),
        interpret=mode == "interpret",
        name="normalised_gradient",
    )(*read, gain, inverse)
    return found[0], None if gate is None else found[1], jnp.sum(found[-1], axis=0)


def _gradients(
    how: How, inputs: list[Row], gains: Row, inverse: jax.Array, k: int
) -> tuple[list[Row], Row]:
    """Gradients by x and gate, and the rows' shares of that by the gains."""
    d, x, *rest = inputs
    acts = [activation(how, gate) for gate in rest[0]] if rest else []
    product = [act * part for (act, _), part in zip(acts, x, strict=True)] if rest else x
    normal = [part * inverse for part in product]
    pulled = [part * own for part, own in zip(d, gains, strict=True)]
    mean = sum_products(pulled, normal) / k
    by_product = [inverse * (p - n * mean) for p, n in zip(pulled, normal, strict=True)]
    shares = [part * n for part, n in zip(d, normal, strict=True)]
    if not rest:
        return [by_product], shares
    by_x = [p * act for p, (act, _) in zip(by_product, acts, strict=True)]
    by_gate = [p * part * slope for p, part, (_, slope) in zip(by_product, x, acts, strict=True)]
    return [by_x, by_gate], shares
