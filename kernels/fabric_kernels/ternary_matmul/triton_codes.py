"""Products of int8 codes with codes of weights that are unpacked, scaled before they are stored.

Few contracted channels leave the Hopper kernel little to hide a tile's stores behind. Here several
programs share a multiprocessor, and one multiplies while another stores.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from fabric_kernels.ternary_matmul.triton_kernels import contract, load, store
from fabric_kernels.triton_call import Mode
from fabric_kernels.triton_programs import program_id


@dataclass(frozen=True)
class Tile:
    """One program's work.

    Attributes:
        m: tokens.
        n: outputs.
        k: of the sums, at a time.
        warps: of a program.
        stages: of the pipeline of loads.
    """

    m: int = 128
    n: int = 128
    k: int = 128
    warps: int = 8
    stages: int = 3


def scaled(
    dtype: jnp.dtype,
    tile: Tile,
    codes: jax.Array,
    weights: jax.Array,
    factor: jax.Array,
    *,
    mode: Mode,
) -> jax.Array:
    """``(codes[M, K] · weights[N, K]^T) · factor[M]`` in ``dtype``: exact sums, rounded once.

    Args:
        dtype: of the result.
        tile: sizes.
        codes: int8.
        weights: int8.
        factor: float32.
        mode: what runs it.
    """
    (m, k), n = codes.shape, weights.shape[0]
    columns = pl.cdiv(n, tile.n)

    def kernel(codes: Any, weights: Any, factor: Any, out: Any) -> None:
        # Outputs are the inner axis: what tokens a program reads its neighbours read too.
        row = lax.div(program_id(mode), columns) * tile.m
        column = lax.rem(program_id(mode), columns) * tile.n

        def step(i: jax.Array, total: jax.Array) -> jax.Array:
            a = load(codes, (row, i * tile.k), (tile.m, tile.k))
            b = load(weights, (column, i * tile.k), (tile.n, tile.k))
            return total + contract(a, b, (1, 1), jnp.int32)

        total = jnp.zeros((tile.m, tile.n), jnp.int32)
        total = lax.fori_loop(0, pl.cdiv(k, tile.k), step, total)
        tokens = row + lax.iota(jnp.int32, tile.m)
        inside = None if m % tile.m == 0 else tokens < m
        other = None if inside is None else jnp.float32(0)
        own = plgpu.load(factor.at[pl.ds(row, tile.m)], mask=inside, other=other)
        store(out, (total.astype(jnp.float32) * own[:, None]).astype(dtype), row, column)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((m, n), dtype),
        grid=(pl.cdiv(m, tile.m) * columns,),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=mode == "interpret",
        name="scaled_codes",
    )(codes, weights, factor)
