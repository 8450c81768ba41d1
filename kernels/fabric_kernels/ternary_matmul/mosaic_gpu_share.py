"""What adapters add to a product of ``mosaic_gpu_rows`` or ``mosaic_gpu_transposed``: its epilogue.

The accumulators of a tile, scaled and in float32, are what the accumulators of ``B^T · u^T`` begin
with: a few more instructions of the matrix units, of half-precision operands, in place of a pass
over the output. Each warpgroup copies its own operands, while its products run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fabric_kernels.low_rank import LowRank

RANK = 16
"""Of narrow products and B in a product's epilogue, one instruction's. Larger adapters are added in
a pass of their own."""
TRANSFORMS = plgpu.TilingTransform((8, RANK)), plgpu.SwizzleTransform(2 * RANK)
"""Of shared memory: rows of so many columns, in both operands of an instruction."""


@dataclass(frozen=True)
class Share:
    """A low-rank product ``u · B``, of a rank that is a multiple of ``RANK``.

    Attributes:
        narrow: bfloat16 [M, S], R columns of which are u.
        start: the first of them, a multiple of ``RANK``.
        b: bfloat16 [R, N].
    """

    narrow: jax.Array
    start: int
    b: jax.Array


def shares_of(
    narrow: jax.Array, adapters: Sequence[LowRank | None], dtype: jnp.dtype
) -> list[Share | None]:
    """Of each adapter, or None for all where one of them is not for this module.

    ``narrow`` are their narrow products side by side, each followed by zeros up to ``RANK``.
    """
    present = [one for one in adapters if one is not None]
    if dtype != jnp.bfloat16 or any(one.b.shape[0] > RANK for one in present):
        return [None] * len(adapters)
    shares: list[Share | None] = []
    for one in adapters:
        start = RANK * sum(share is not None for share in shares)
        shares.append(None if one is None else Share(narrow, start, _padded(one.b)))
    return shares


def all_shares(narrow: jax.Array, adapters: Sequence[LowRank | None]) -> Share:
    """The sum of ``narrow · A`` of all adapters as one product, narrow side by side."""
    rows = [_padded(one.a) for one in adapters if one is not None]
    return Share(narrow, 0, jnp.concatenate(rows))


def _padded(b: jax.Array) -> jax.Array:
    rank = max(RANK, 1 << (b.shape[0] - 1).bit_length())
    return jnp.pad(b.astype(jnp.bfloat16), ((0, rank - b.shape[0]), (0, 0)))


def scratch(warpgroups: int, tokens: int, outputs: int, rank: int = RANK) -> list[Any]:
    """Shared memory of the operands of each warpgroup, and its barrier."""
    return [
        plgpu.SMEM((warpgroups, tokens, rank), jnp.bfloat16, transforms=TRANSFORMS),
        plgpu.SMEM((warpgroups, rank, outputs), jnp.bfloat16, transforms=TRANSFORMS),
        plgpu.Barrier(num_arrivals=2, num_barriers=warpgroups),
    ]


def scratch_bytes(warpgroups: int, tokens: int, outputs: int, rank: int = RANK) -> int:
    """Of them."""
    return warpgroups * 2 * rank * (tokens + outputs)


@dataclass(frozen=True)
class Operands:
    """A warpgroup's view: arrays of all, its shared memory, where its tile lies."""

    narrow: Any
    b: Any
    narrow_smem: Any
    b_smem: Any
    barrier: Any
    start: int

    def copy(self, token: jax.Array, output: jax.Array) -> None:
        """Starts the copies for a tile, whose first token and output these are."""
        tokens = pl.ds(token, self.narrow_smem.shape[0])
        outputs = pl.ds(output, self.b_smem.shape[1])
        narrow = self.narrow.at[tokens, pl.ds(self.start, self.b_smem.shape[0])]
        plgpu.copy_gmem_to_smem(narrow, self.narrow_smem, self.barrier)
        plgpu.copy_gmem_to_smem(self.b.at[:, outputs], self.b_smem, self.barrier)

    def add(self, values: jax.Array, *, interpret: bool) -> jax.Array:
        """``values`` float32 [outputs, tokens] and the tile's share."""
        plgpu.barrier_wait(self.barrier)
        if interpret:
            b, narrow = self.b_smem[...], self.narrow_smem[...]
            return values + jnp.dot(b.T, narrow.T, preferred_element_type=jnp.float32)

        def multiply(acc_ref: Any) -> None:
            plgpu.wgmma(acc_ref, self.b_smem.transpose((1, 0)), self.narrow_smem.transpose((1, 0)))
            plgpu.wgmma_wait(0)

        start: Any = plgpu.WGMMAAccumulatorRef.init(values)
        return cast("jax.Array", pl.run_state(multiply)(start))
