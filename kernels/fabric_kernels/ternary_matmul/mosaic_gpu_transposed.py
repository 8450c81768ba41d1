"""Backward products ``dx = sum scale_i · (g_i · codes_i)`` on Hopper's matrix units (Mosaic GPU).

As in ``mosaic_gpu`` the roles are swapped and the weights are the register operand of wgmma, which
here runs over outputs n: ``dx^T[K, M] = codes^T[K, N] · g^T[N, M]``. A row of that operand is one
k. Which one is free to choose, since the accumulators are stored by address, and it is chosen such
that a shift and a mask make a register of a packed word (``mosaic_gpu_unpack``): a lane has 16-bit
words of packed rows, and each of the four warps makes two of their eight codes.

All matrices of a group add to the same accumulators, which hold the sum in units of the scale of
the matrix that is being read. While a step's products run, the next step is unpacked: registers of
an operand may not be written before its product is done, so steps take turns at two sets of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fabric_kernels.packing import CODES_PER_BYTE, unpack_ternary2
from fabric_kernels.ternary_matmul import mosaic_gpu_cluster, mosaic_gpu_share
from fabric_kernels.ternary_matmul.mosaic_gpu_pipeline import (
    AT_ONCE,
    COMPUTE_REGISTERS,
    MEMORY_REGISTERS,
    SLOTS,
    TILE_ROWS,
    WARPGROUPS,
    Blocks,
    Pipeline,
    barriers,
    transforms,
)
from fabric_kernels.ternary_matmul.mosaic_gpu_share import Operands, Share
from fabric_kernels.ternary_matmul.mosaic_gpu_stack import padded_stack, round_up, whole_tiles
from fabric_kernels.ternary_matmul.mosaic_gpu_unpack import store_transposed, transposed_codes
from fabric_kernels.ternary_matmul.weight import TernaryWeight

STEP = 64
"""Outputs n of a pipeline step: 128 bytes of a row of gradients, the widest swizzle."""
STORE = 16
"""Tokens that are stored at a time."""
BYTES = 32
"""Packed bytes of a row in a block."""
WIDTH = BYTES * CODES_PER_BYTE
"""Inputs k of a block."""
ROWS = WIDTH // WARPGROUPS
"""Of a warpgroup's accumulators."""
SHARED_BYTES = 224 << 10
"""Of the pipeline, what the epilogue stores from and what adapters add; barriers have the rest."""
MOST_STAGES = 8
UNIT = -0.5
"""What a code is multiplied with after the product: the register operand is minus two codes."""
LEAST_RATIO = 2.0**-60
"""A scale so much smaller than the one before it counts as that: its products are lost in the
rounding of the sum, and the accumulators stay finite."""
MOST_RANK = 64
"""Of what adapters add: their operands take shared memory from the pipeline."""
DTYPES = (jnp.bfloat16, jnp.float16)
"""Of gradients."""


@dataclass(frozen=True)
class Memory:
    """What a warpgroup that computes reads and writes, but for the pipeline.

    Attributes:
        out: of the output, in device memory.
        out_smem: stores under way, [slots, tokens, inputs].
        share: the operands of a share, or None.
        received: none or one array of what other blocks of the cluster send.
        stand_ins: operands of products in interpret mode, otherwise none.
    """

    out: Any
    out_smem: Any
    share: Operands | None
    received: Sequence[Any]
    stand_ins: Sequence[Any]


@dataclass(frozen=True)
class Tiles:
    """How a product is cut up.

    Attributes:
        tokens: of a block; a multiple of 8, at most 256.
        parts: blocks of a cluster among which n is divided. Each then stores a part of the tokens,
            a multiple of 8 of them.
    """

    tokens: int
    parts: int = 1

    @property
    def stored(self) -> int:
        """Tokens that a block of a cluster stores."""
        return self.tokens // self.parts

    @property
    def store(self) -> int:
        """Of them at a time."""
        return STORE

    def stages(self, other: int = 0) -> int:
        """Steps in shared memory, beside ``other`` bytes."""
        step = STEP * (2 * self.tokens + BYTES)
        other += 2 * SLOTS * self.store * WIDTH
        if self.parts > 1:
            other += 4 * self.tokens * WIDTH
        stages = min(MOST_STAGES, (SHARED_BYTES - other) // step)
        assert stages > 1, "the place of a step gets free when the next one has been read"
        return stages


def choose_tiles(m: int, k: int, n: int) -> Tiles:
    """Those that take the shortest time, counting the last round of the multiprocessors.

    In the unit of a token's products in a step, of which an H200 makes one in 2.5 ns (jax 0.11.2,
    CUDA 13): a step takes as long as its tokens and 40 more, a tile 4 us for what is before and
    after its steps, and 1 us more where blocks exchange sums.
    """

    def cost(tiles: Tiles) -> int:
        blocks = pl.cdiv(m, tiles.tokens) * pl.cdiv(k, WIDTH)
        steps = pl.cdiv(pl.cdiv(n, STEP), tiles.parts)
        ends = 1600 + 400 * (tiles.parts > 1)
        return pl.cdiv(blocks, AT_ONCE[tiles.parts]) * (steps * (tiles.tokens + 40) + ends)

    alone = [Tiles(tokens) for tokens in range(256, 48, -16)]
    clusters = [Tiles(tokens, parts) for tokens in (128, 64) for parts in (2, 4)]
    return min(alone + clusters, key=cost)


def takes(gradients: Sequence[jax.Array], weights: Sequence[TernaryWeight]) -> bool:
    """Whether dtypes and packings are those of the kernel."""
    return all(g.dtype in DTYPES for g in gradients) and all(
        weight.packing == "ternary2" for weight in weights
    )


def product(
    gradients: Sequence[jax.Array],
    weights: Sequence[TernaryWeight],
    *,
    tiles: Tiles | None = None,
    share: Share | None = None,
    interpret: Any = None,
) -> jax.Array:
    """``sum_i scale_i · (g_i · codes_i)``, [M, K] in the dtype of the gradients.

    Summed in float32, rounded once.

    Args:
        gradients: [M, N_i], bfloat16 or float16; M is not 0.
        weights: of each, ``ternary2``, of the same K.
        tiles: sizes; chosen where None.
        share: a low-rank product [M, K] that is added, of a rank up to ``MOST_RANK``.
        interpret: parameters of interpret mode.
    """
    assert takes(gradients, weights), "the caller has looked"
    m, k = gradients[0].shape[0], weights[0].k
    tiles = tiles or choose_tiles(m, k, sum(weight.n for weight in weights))
    dtype = gradients[0].dtype
    rows = round_up(max(m, tiles.tokens), TILE_ROWS)
    # A block's second warpgroup may have no inputs; a cluster's, no outputs or no tokens to store.
    whole = whole_tiles if tiles.parts > 1 else round_up
    shape = whole(m, TILE_ROWS), whole_tiles(k, STEP)
    if interpret:  # which has no tiles that end past an array, and no clusters
        tiles = replace(tiles, parts=1)
        rows = round_up(m, tiles.tokens)
        shape = (rows, round_up(k, WIDTH))
    operands: list[Any] = []
    for g, weight in zip(gradients, weights, strict=True):
        # Padded n meet zeros of the gradients, padded k are not stored.
        n, width = weight.packed.shape[-2:]
        stack = padded_stack(weight, whole(n, STEP), round_up(width, BYTES))
        packed, scale, layer = stack.packed, stack.scale.reshape(-1), stack.layer
        pad = ((0, rows - m), (0, packed.shape[1] - g.shape[1]))
        g = jnp.pad(g, pad) if any(p for _, p in pad) else g
        operands.append((layer, scale, packed, g))
    extra: list[jax.Array] = []
    if share is not None:
        narrow = jnp.pad(share.narrow, ((0, rows - m), (0, 0)))
        extra = [narrow, _permuted(share.b)]
    call = _call(tiles, shape, dtype, operands, extra, interpret)
    return call(*jax.tree.leaves(operands), *extra)[:m, :k]


def _permuted(a: jax.Array) -> jax.Array:
    """[R, K] as [R, K'], whole blocks, with k in the order of the rows of accumulators."""
    a = jnp.pad(a, ((0, 0), (0, -a.shape[1] % WIDTH)))
    # Blocks of 64 k, and of each the eight words, the four warps' codes and two codes of each.
    parts = a.reshape(a.shape[0], -1, 8, 4, 2)
    return parts.transpose(0, 1, 3, 4, 2).reshape(a.shape)


def _call(
    tiles: Tiles,
    shape: tuple[int, int],
    dtype: jnp.dtype,
    operands: Sequence[Any],
    extra: Sequence[jax.Array],
    interpret: Any,
) -> Callable[..., jax.Array]:
    """The kernel as a function of all operands, and of what is ``extra``: both of a share."""
    blocks = Blocks(shape, tiles.tokens, WIDTH, tiles.parts)
    other, places = 0, []
    if extra:
        sizes = WARPGROUPS, tiles.stored, ROWS, extra[1].shape[0]
        places, other = mosaic_gpu_share.scratch(*sizes), mosaic_gpu_share.scratch_bytes(*sizes)
    stages = tiles.stages(other)
    of_bytes, of_rows = transforms(BYTES, 1), transforms(2 * STEP, 2)
    scratch: list[Any] = [
        plgpu.SMEM((stages, STEP, BYTES), jnp.uint8, transforms=of_bytes),
        plgpu.SMEM((stages, tiles.tokens, STEP), dtype, transforms=of_rows),
        *barriers(stages),
        plgpu.SMEM((WARPGROUPS, SLOTS, tiles.store, ROWS), dtype, transforms=of_rows),
        *places,
    ]
    if tiles.parts > 1:
        sizes = tiles.parts, ROWS, tiles.tokens
        scratch.append(mosaic_gpu_cluster.scratch(*sizes, jnp.float32))
    options: dict[str, Any] = {}
    if interpret:
        options["interpret"] = interpret
        for stand_in in ((ROWS, STEP), (STEP, tiles.tokens)):
            scratch.append(plgpu.SMEM((WARPGROUPS, *stand_in), dtype))
    else:
        semantics = plgpu.LoweringSemantics.Warpgroup
        options["compiler_params"] = plgpu.CompilerParams(lowering_semantics=semantics)
    return plgpu.kernel(
        partial(_kernel, tiles, blocks, len(operands), stages, bool(extra)),
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        scratch_types=scratch,
        **blocks.grid,
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        **options,
    )


def _kernel(
    tiles: Tiles, blocks: Blocks, matrices: int, stages: int, shared: bool, *refs: Any
) -> None:
    """Every block: its tiles of the output in turn, copied for by one warpgroup."""
    operands = [refs[4 * i : 4 * i + 4] for i in range(matrices)]
    refs = refs[4 * matrices :]
    arrays, (out_ref, packed, gradients, full, empty, out_smem, *rest) = (
        (refs[:2], refs[2:]) if shared else ((), refs)
    )
    places, rest = (rest[:3], rest[3:]) if shared else ((), rest)
    received, stand_ins = (rest[:1], rest[1:]) if tiles.parts > 1 else ((), rest)
    pipeline = Pipeline(packed, gradients, full, empty, stages)
    steps = sum(_steps(tiles, g_ref) for *_, g_ref in operands)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < WARPGROUPS)
    def _() -> None:
        if not stand_ins:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        share = None
        if shared:
            own = [ref.at[warpgroup] for ref in places]
            share = mosaic_gpu_share.Operands(*arrays, *own, start=0)
        memory = Memory(out_ref, out_smem.at[warpgroup], share, received, stand_ins)
        blocks.each(steps, partial(_multiply, tiles, blocks, operands, memory, pipeline))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(warpgroup == WARPGROUPS)
    def _() -> None:
        if not stand_ins:
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
        blocks.each(steps, partial(_copy, tiles, blocks, operands, pipeline))
        if tiles.parts > 1:
            mosaic_gpu_cluster.take_part()


def _steps(tiles: Tiles, g_ref: Any) -> int:
    """Of a block, over the outputs of a matrix."""
    return pl.cdiv(g_ref.shape[1] // STEP, tiles.parts)


def _copy(
    tiles: Tiles,
    blocks: Blocks,
    operands: Sequence[Any],
    pipeline: Pipeline,
    count: jax.Array,
    token: jax.Array,
    column: jax.Array,
) -> None:
    """The steps of a tile to shared memory, as places get free."""
    for layer_ref, _, packed_ref, g_ref in operands:
        layer, steps = layer_ref[0], _steps(tiles, g_ref)
        bytes_, tokens = pl.ds(column * BYTES, BYTES), pl.ds(token, tiles.tokens)

        def step(
            i: jax.Array,
            _: None,
            count: jax.Array = count,
            start: Any = blocks.part * steps,
            packed: Any = packed_ref.at[layer, :, bytes_],
            g: Any = g_ref.at[tokens],
        ) -> None:
            n = pl.ds((start + i) * STEP, STEP)
            pipeline.fill(count + i, packed.at[n], g.at[:, n])

        lax.fori_loop(0, steps, step, None)
        count = count + steps


def _multiply(
    tiles: Tiles,
    blocks: Blocks,
    operands: Sequence[Any],
    memory: Memory,
    pipeline: Pipeline,
    count: jax.Array,
    token: jax.Array,
    column: jax.Array,
) -> None:
    """A tile of the output: its products over all matrices, scaled, the share added, stored."""
    first = column * WIDTH + lax.axis_index("warpgroup") * ROWS
    token, stand_ins = token + blocks.part * tiles.stored, memory.stand_ins
    if memory.share is not None:
        memory.share.copy(token, first)
    acc = jnp.zeros((ROWS, tiles.tokens), jnp.float32)
    if not stand_ins:
        acc = plgpu.layout_cast(acc, plgpu.Layout.WGMMA)
    unit = jnp.float32(1)
    for i, (layer_ref, scale_ref, _, g_ref) in enumerate(operands):
        own = scale_ref[layer_ref[0] if scale_ref.shape[0] > 1 else 0]
        if i:
            own, ratio = _next_unit(unit, own)
            acc = acc * ratio
        unit, steps = own, _steps(tiles, g_ref)
        run = partial(_accumulate, pipeline, stand_ins, count, steps)
        if stand_ins:
            acc = acc + _interpreted_sum(run, (ROWS, tiles.tokens))
        else:
            start: Any = plgpu.WGMMAAccumulatorRef.init(acc)
            acc = cast("jax.Array", pl.run_state(run)(start))
        count = count + steps
    if memory.received:
        acc = mosaic_gpu_cluster.sum_of_parts(memory.received[0], acc, tiles.parts)
    acc = acc * (unit * UNIT)
    if memory.share is not None:
        acc = memory.share.add(acc, interpret=bool(stand_ins))
    _store(tiles, memory, acc, token, first)


def _next_unit(unit: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The unit of the next matrix' sums, its scale, and what brings sums so far to it."""
    least = jnp.abs(unit) * LEAST_RATIO
    scale = jnp.where(jnp.abs(scale) < least, least, scale)
    return scale, jnp.where(scale == 0, jnp.float32(1), unit / scale)


def _accumulate(
    pipeline: Pipeline,
    stand_ins: Sequence[Any],
    count: jax.Array,
    steps: int,
    acc_ref: Any,
) -> None:
    """Adds the products of a matrix' steps, whose copies have the numbers from ``count`` on."""

    def step(i: jax.Array) -> None:
        slot = pipeline.slot(count + i)
        plgpu.barrier_wait(pipeline.full.at[slot])
        packed, g = pipeline.packed.at[slot], pipeline.rows.at[slot]
        if stand_ins:
            own = [ref.at[lax.axis_index("warpgroup")] for ref in stand_ins]
            _interpreted_product(acc_ref, packed[...], g[...], *own)
        else:
            plgpu.wgmma(acc_ref, _unpack(packed, g.dtype), g.transpose((1, 0)))
        # All but this step's products are done: the place of the step before is free.
        plgpu.wgmma_wait(1)

        @pl.when(i > 0)
        def _() -> None:
            plgpu.barrier_arrive(pipeline.empty.at[pipeline.slot(count + i - 1)])

    def pair(i: jax.Array, _: None) -> None:
        # Two in a turn of the loop have the compiler give them registers of their own.
        step(2 * i)
        step(2 * i + 1)

    lax.fori_loop(0, steps // 2, pair, None)
    if steps % 2:
        step(jnp.int32(steps - 1))
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(pipeline.empty.at[pipeline.slot(count + steps - 1)])


def _unpack(packed_ref: Any, dtype: Any) -> jax.Array:
    """This warpgroup's rows of the register operand, [rows, STEP]."""
    layout, shape = plgpu.Layout.WGMMA, (ROWS, STEP)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(transforms(BYTES, 1)),),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout),
    )
    def codes(_: Any, ref: Any) -> Any:
        return transposed_codes(ref, STEP, dtype)

    return cast("Callable[[Any], jax.Array]", codes)(packed_ref)


def _interpreted_sum(run: Callable[[Any], None], shape: tuple[int, int]) -> jax.Array:
    """Interpret mode has no accumulators that begin with a value."""

    def from_zero(acc_ref: Any) -> jax.Array:
        run(acc_ref)
        return acc_ref[...]

    return pl.run_scoped(from_zero, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def _interpreted_product(
    acc_ref: Any, packed: jax.Array, g: jax.Array, codes_smem: Any, g_smem: Any
) -> None:
    """The product of what ``_unpack`` makes; interpret mode takes whole references only."""
    codes = unpack_ternary2(packed, WIDTH).reshape(STEP, WARPGROUPS, -1, 8, 4, 2)
    own = lax.dynamic_index_in_dim(codes, lax.axis_index("warpgroup"), 1, keepdims=False)
    rows = own.transpose(1, 3, 4, 2, 0).reshape(ROWS, STEP)
    codes_smem[...] = rows.astype(codes_smem.dtype) * (1 / UNIT)
    g_smem[...] = g.T
    plgpu.wgmma(acc_ref, codes_smem, g_smem)


def _store(
    tiles: Tiles, memory: Memory, acc: jax.Array, token: jax.Array, first: jax.Array
) -> None:
    """Accumulators [rows, tokens] of this warpgroup, rounded, to the k from ``first`` on."""
    dtype, store = memory.out.dtype, tiles.store

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(transforms(2 * STEP, 2)), plgpu.Layout.WGMMA),
    )
    def transposed(_: Any, ref: Any, values: Any) -> None:
        store_transposed(ref, values, dtype)

    for part in range(tiles.stored // store):
        values = acc[:, part * store : (part + 1) * store]
        slot = memory.out_smem.at[part % SLOTS]
        plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
        if memory.stand_ins:
            rows = values.reshape(-1, 4, 2, 8, store).transpose(4, 0, 3, 1, 2)
            slot[...] = rows.reshape(store, ROWS).astype(dtype)
        else:
            cast("Callable[..., None]", transposed)(slot, values)
        plgpu.commit_smem()
        tokens = pl.ds(token + part * store, store)
        plgpu.copy_smem_to_gmem(slot, memory.out.at[tokens, pl.ds(first, ROWS)])
