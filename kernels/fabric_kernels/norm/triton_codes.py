"""The norm of ``triton_kernels`` and the quantiser of what it gives, in one launch.

A row is read once for the normalised values, which adapters and the backward pass read, and for the
codes that products read. The values are the norm kernel's, bit for bit, and the codes those of
``absmax_quantize`` of them.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from fabric_kernels.absmax import EPSILON
from fabric_kernels.norm.triton import How
from fabric_kernels.norm.triton_kernels import Ref, columns_of, normalised, params
from fabric_kernels.triton_call import Mode
from fabric_kernels.triton_exact import round_product, scalar_reciprocal
from fabric_kernels.triton_programs import program_id

Scale = tuple[jax.Array, jax.Array]
"""Of a matrix: float32 [L] or [1], and its layer int32 [1]."""


def forward(
    how: How,
    x: tuple[jax.Array, ...],
    gain: jax.Array,
    scales: Sequence[Scale],
    shape: tuple[int, int],
    *,
    mode: Mode,
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """The normalised rows, their codes, and what multiplies a token of each matrix' product.

    Args:
        how: what is computed.
        x: (x,) or (gate, up), floats [M, n].
        gain: [n].
        scales: of each matrix.
        shape: of the codes: at least M rows, those past M are left as they are; n columns or more,
            those past n zeros, up to the next power of two.
        mode: what runs it; not ``rocm``, where nothing rounds as exactly.

    Returns:
        [M, n] in the dtype of x; int8 ``shape``; float32 [rows of ``shape``] for each matrix.
    """
    assert shape[1] <= pl.next_power_of_2(x[0].shape[1]), "the caller has looked"

    def kernel(x: tuple[Ref, ...], gain: Ref, scales: Sequence[tuple[Ref, Ref]], *outs: Ref):
        out, codes, *factors = outs
        token = program_id(mode)
        at, mask = columns_of(out)
        values = normalised(how, x, gain, out)
        plgpu.store(out.at[token, at], values, mask=mask)
        row = values.astype(jnp.float32)
        # A maximum need not keep what is not a number.
        largest = jnp.max(jnp.where(row == row, jnp.abs(row), jnp.inf))
        scale = scalar_reciprocal(jnp.maximum(largest, EPSILON), mode) * 127.0
        rounded = jnp.clip(round_product(row, scale, mode), -128, 127).astype(jnp.int8)
        inside = None if at.size == codes.shape[1] else at < codes.shape[1]
        plgpu.store(codes.at[token, at], rounded, mask=inside)
        factor = scalar_reciprocal(scale, mode)
        factor = jnp.where(largest == jnp.inf, jnp.nan, factor)
        for ref, (of_matrix, layer) in zip(factors, scales, strict=True):
            ref[token] = factor * of_matrix[layer[0] if of_matrix.shape[0] > 1 else 0]

    shapes = [jax.ShapeDtypeStruct(x[0].shape, x[0].dtype), jax.ShapeDtypeStruct(shape, jnp.int8)]
    shapes += [jax.ShapeDtypeStruct(shape[:1], jnp.float32)] * len(scales)
    values, codes, *factors = pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid=(x[0].shape[0],),
        compiler_params=params(x[0].shape[1]),
        interpret=mode == "interpret",
        name="norm_and_codes",
    )(x, gain, list(scales))
    return values, codes, factors
