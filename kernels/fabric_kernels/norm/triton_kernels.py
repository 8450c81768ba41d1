"""Pallas-Triton kernels of norms: a program for each row. ``triton.py`` calls them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from fabric_kernels.norm.triton import How
from fabric_kernels.triton_call import Mode
from fabric_kernels.triton_programs import program_id

Ref = Any


def forward(how: How, x: tuple[jax.Array, ...], gain: jax.Array, *, mode: Mode) -> jax.Array:
    """``act(gate) · up`` or x, [M, n], normalised, times ``gain`` [n]."""

    def kernel(x: tuple[Ref, ...], gain: Ref, out: Ref) -> None:
        at, mask = columns_of(out)
        plgpu.store(out.at[program_id(mode), at], normalised(how, x, gain, out), mask=mask)

    shape = jax.ShapeDtypeStruct(x[0].shape, x[0].dtype)
    return _call(kernel, shape, params(gain.size), mode, "norm")(x, gain)


def normalised(how: How, x: tuple[Ref, ...], gain: Ref, out: Ref) -> jax.Array:
    """This program's row in the dtype of ``out``; zeros past its columns."""
    at, mask = columns_of(out)
    product = _product(how, [_load(ref, at, mask) for ref in x])
    normal = (product * _inverse(how, product, out.shape[1])).astype(out.dtype)
    return normal * _load(gain, at, mask, row=False).astype(out.dtype)


def backward(
    how: How,
    x: tuple[jax.Array, ...],
    gain: jax.Array,
    dy: jax.Array,
    beside: jax.Array | None = None,
    *,
    mode: Mode,
) -> tuple[jax.Array, ...]:
    """The gradients of :func:`forward` by its rows, of ``dy`` [M, n]; the last plus ``beside``."""

    def kernel(x: tuple[Ref, ...], gain: Ref, dy: Ref, beside: Ref | None, *outputs: Ref) -> None:
        row = program_id(mode)
        at, mask = columns_of(dy)
        rows = [_load(ref, at, mask) for ref in x]
        product = _product(how, rows)
        inverse = _inverse(how, product, dy.shape[1])
        normal = product * inverse
        d_normal = _load(dy, at, mask) * _load(gain, at, mask, row=False)
        common = jnp.sum(normal * d_normal) / dy.shape[1]
        d_product = inverse * (d_normal - normal * common)
        gradients = [d_product]
        if how.activation is not None:
            gate, up = rows
            activated, slope = activation(how, gate)
            gradients = [d_product * up * slope, d_product * activated]
        if beside is not None:
            gradients[-1] = gradients[-1] + _load(beside, at, mask)
        for out, gradient in zip(outputs, gradients, strict=True):
            plgpu.store(out.at[row, at], gradient.astype(out.dtype), mask=mask)

    shapes = [jax.ShapeDtypeStruct(one.shape, one.dtype) for one in x]
    tile = params(gain.size, gradients=True)
    return tuple(_call(kernel, shapes, tile, mode, "norm_gradients")(x, gain, dy, beside))


def _call(kernel: Any, shapes: Any, tile: plgpu.CompilerParams, mode: Mode, name: str) -> Any:
    return pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid=(jax.tree.leaves(shapes)[0].shape[0],),
        compiler_params=tile,
        interpret=mode == "interpret",
        name=name,
    )


def params(columns: int, *, gradients: bool = False) -> plgpu.CompilerParams:
    """Of a program that has a row of so many channels.

    The fastest on an H200 of 2048 channels and, gated, of 3584; a row of 8,192 or more has to fit
    the registers.
    """
    block = pl.next_power_of_2(columns)
    warps = 8 if block <= 2048 else 16 if gradients or block > 4096 else 4
    return plgpu.CompilerParams(num_warps=min(warps, max(1, block // 128)), num_stages=1)


def columns_of(ref: Ref) -> tuple[jax.Array, jax.Array | None]:
    """Indices of a row [n], up to the next power of two, and which of them there are."""
    n = ref.shape[1]
    at = lax.iota(jnp.int32, pl.next_power_of_2(n))
    return at, None if at.size == n else at < n


def _load(ref: Ref, at: jax.Array, mask: jax.Array | None, *, row: bool = True) -> jax.Array:
    """This program's row, or the only one, in float32; zeros where there is nothing."""
    where = ref.at[pl.program_id(0), at] if row else ref.at[at]
    other = None if mask is None else jnp.zeros((), ref.dtype)
    return plgpu.load(where, mask=mask, other=other).astype(jnp.float32)


def _product(how: How, rows: list[jax.Array]) -> jax.Array:
    return rows[0] if how.activation is None else activation(how, rows[0])[0] * rows[1]


def _inverse(how: How, product: jax.Array, n: int) -> jax.Array:
    return lax.rsqrt(jnp.sum(product * product) / n + how.eps)


def activation(how: How, gate: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The activation and its derivative."""
    if how.activation == "relu2":
        positive = jnp.maximum(gate, 0.0)
        # A maximum need not keep what is not a number.
        positive = jnp.where(gate == gate, positive, gate)
        return positive * positive, 2.0 * positive
    share = 1.0 / (1.0 + jnp.exp(-gate))
    return gate * share, share * (1.0 + gate * (1.0 - share))
