"""Backward products ``dx = sum scale_i · (g_i · codes_i)`` on Hopper's matrix units (Mosaic GPU).

As in ``mosaic_gpu`` the roles are swapped and the weights are the register operand of wgmma, which
here runs over outputs n: ``dx^T[K, M] = codes^T[K, N] · g^T[N, M]``. A row of that operand is one
k. Which one is free to choose, since the accumulators are stored by address, and it is chosen such
that two shifted masks make a register of a packed word (``mosaic_gpu_unpack``): a block's 256 k are
64 bytes of a packed row; a lane has one 16-bit word of them, its low byte in the first warpgroup
and its high byte in the second, so four consecutive k each, which are eight bytes of the output.

All matrices of a group add to the same accumulators, which hold the sum in units of the scale of
the matrix that is being read. While a step's products run, the next step is unpacked: registers of
an operand may not be written before its product is done, so steps take turns at two sets of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fabric_kernels.packing import CODES_PER_BYTE, unpack_ternary2
from fabric_kernels.ternary_matmul import mosaic_gpu_share
from fabric_kernels.ternary_matmul.mosaic_gpu_share import Operands, Share
from fabric_kernels.ternary_matmul.mosaic_gpu_unpack import store_permuted, transposed_codes
from fabric_kernels.ternary_matmul.weight import TernaryWeight

MULTIPROCESSORS = 132
"""Of an H100 SXM and an H200. Any number is correct: a block takes tiles until none are left."""
STEP = 64
"""Outputs n of a pipeline step: 128 bytes of a row of gradients, the widest swizzle."""
BYTES = 64
"""Packed bytes of a row in a block."""
WIDTH = BYTES * CODES_PER_BYTE
"""Inputs k of a block."""
WARPGROUPS = 2
"""That compute; a third one copies."""
ROWS = WIDTH // WARPGROUPS
"""Of a warpgroup's accumulators."""
RUN = 4
"""Consecutive k of a lane."""
TILE_ROWS = 8
"""Of a swizzled tile of shared memory; what it is copied from has whole tiles."""
SHARED_BYTES = 216 << 10
"""Of the pipeline, and what adapters add."""
MOST_STAGES = 8
MEMORY_REGISTERS, COMPUTE_REGISTERS = 40, 232
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
class Tiles:
    """How a product is cut up.

    Attributes:
        tokens: of a block; a multiple of 8, at most 128.
    """

    tokens: int

    def stages(self, other: int = 0) -> int:
        """Steps in shared memory, beside ``other`` bytes."""
        step = STEP * (2 * self.tokens + BYTES)
        return min(MOST_STAGES, (SHARED_BYTES - other) // step)


def choose_tiles(m: int, k: int) -> Tiles:
    """Those that keep the multiprocessors busy for the shortest time, counting their last round.

    A block takes as long as its tokens and, for copies and the two ends, 16 more.
    """

    def cost(tokens: int) -> int:
        blocks = pl.cdiv(m, tokens) * pl.cdiv(k, WIDTH)
        return pl.cdiv(blocks, MULTIPROCESSORS) * (tokens + 16)

    return Tiles(min((128, 112, 96, 80, 64), key=cost))


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
    tiles = tiles or choose_tiles(m, k)
    dtype = gradients[0].dtype
    rows, shape = _up(max(m, tiles.tokens), TILE_ROWS), (m, _up(k, RUN * WARPGROUPS))
    if interpret:  # which has no tiles that end past an array
        rows = _up(m, tiles.tokens)
        shape = (rows, _up(k, WIDTH))
    operands: list[Any] = []
    for g, weight in zip(gradients, weights, strict=True):
        packed, scale, layer = _aligned(weight)
        pad = ((0, rows - m), (0, packed.shape[1] - g.shape[1]))
        g = jnp.pad(g, pad) if any(p for _, p in pad) else g
        operands.append((layer, scale, packed, g))
    extra: list[jax.Array] = []
    if share is not None:
        narrow = jnp.pad(share.narrow, ((0, rows - m), (0, 0)))
        extra = [narrow, _permuted(share.b)]
    call = _call(tiles, shape, dtype, operands, extra, interpret)
    return call(*jax.tree.leaves(operands), *extra).reshape(shape)[:m, :k]


def _permuted(a: jax.Array) -> jax.Array:
    """[R, K] as [R, K'], whole blocks, with k in the order of the rows of accumulators."""
    a = jnp.pad(a, ((0, 0), (0, -a.shape[1] % WIDTH)))
    parts = a.reshape(a.shape[0], -1, 4, 8, WARPGROUPS, 2, 2)
    return parts.transpose(0, 1, 4, 5, 2, 6, 3).reshape(a.shape)


def _up(size: int, multiple: int) -> int:
    return pl.cdiv(size, multiple) * multiple


def _aligned(weight: TernaryWeight) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The stack uint8 [L, N, W], its scales float32 [L] or [1], and the layer int32 [1].

    The stack itself where N and W are whole steps and blocks; otherwise a padded copy of the layer:
    padded n meet zeros of the gradients, padded k are not stored.
    """
    n, width = weight.packed.shape[-2:]
    pad = ((0, _up(n, STEP) - n), (0, _up(width, BYTES) - width))
    if any(p for _, p in pad):
        weight = weight.single()
        packed = jnp.pad(weight.packed, pad)[None]
    else:
        packed = weight.packed if weight.layer is not None else weight.packed[None]
    layer = jnp.zeros((1,), jnp.int32)
    if weight.layer is not None:
        layer = weight.layer.astype(jnp.int32).reshape(1)
    return packed, weight.scale.reshape(-1), layer


def _call(
    tiles: Tiles,
    shape: tuple[int, int],
    dtype: jnp.dtype,
    operands: Sequence[Any],
    extra: Sequence[jax.Array],
    interpret: Any,
) -> Callable[..., jax.Array]:
    """The kernel as a function of all operands, and of what is ``extra``: both of a share."""
    (m, k), other, places = shape, 0, []
    if extra:
        sizes = WARPGROUPS, tiles.tokens, ROWS, extra[1].shape[0]
        places, other = mosaic_gpu_share.scratch(*sizes), mosaic_gpu_share.scratch_bytes(*sizes)
    stages = tiles.stages(other)
    blocks = pl.cdiv(m, tiles.tokens) * pl.cdiv(k, WIDTH)
    scratch: list[Any] = [
        plgpu.SMEM((stages, STEP, BYTES), jnp.uint8, transforms=_transforms(BYTES, 1)),
        plgpu.SMEM((stages, tiles.tokens, STEP), dtype, transforms=_transforms(2 * STEP, 2)),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        *places,
    ]
    options: dict[str, Any] = {}
    if interpret:
        options["interpret"] = interpret
        for stand_in in ((ROWS, STEP), (STEP, tiles.tokens)):
            scratch.append(plgpu.SMEM((WARPGROUPS, *stand_in), dtype))
    else:
        semantics = plgpu.LoweringSemantics.Warpgroup
        options["compiler_params"] = plgpu.CompilerParams(lowering_semantics=semantics)
    return plgpu.kernel(
        partial(_kernel, tiles, len(operands), stages, bool(extra)),
        # The runs of a row, as the two warpgroups have them in turn.
        out_type=jax.ShapeDtypeStruct((m, k // (RUN * WARPGROUPS), WARPGROUPS, RUN), dtype),
        scratch_types=scratch,
        grid=(min(blocks, MULTIPROCESSORS),),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        **options,
    )


def _transforms(swizzle: int, itemsize: int) -> tuple[Any, ...]:
    return (
        plgpu.TilingTransform((TILE_ROWS, swizzle // itemsize)),
        plgpu.SwizzleTransform(swizzle),
    )


@dataclass(frozen=True)
class Pipeline:
    """Shared memory of the steps under way, and the barriers of each."""

    packed: Any
    gradients: Any
    full: Any
    empty: Any
    stages: int

    def slot(self, count: jax.Array) -> jax.Array:
        """Of the step of that number, counted over all tiles of a block."""
        return lax.rem(count, jnp.int32(self.stages))


def _kernel(tiles: Tiles, matrices: int, stages: int, shared: bool, *refs: Any) -> None:
    """Every block: its tiles of the output in turn, copied for by one warpgroup."""
    operands = [refs[4 * i : 4 * i + 4] for i in range(matrices)]
    refs = refs[4 * matrices :]
    arrays, (out_ref, packed, gradients, full, empty, *rest) = (
        (refs[:2], refs[2:]) if shared else ((), refs)
    )
    places, stand_ins = (rest[:3], rest[3:]) if shared else ((), rest)
    pipeline = Pipeline(packed, gradients, full, empty, stages)
    m, columns = out_ref.shape[0], pl.cdiv(out_ref.shape[1] * RUN * WARPGROUPS, WIDTH)
    lengths = [g_ref.shape[1] // STEP for *_, g_ref in operands]
    blocks = pl.cdiv(m, tiles.tokens) * columns
    block, together = lax.axis_index("block"), min(blocks, MULTIPROCESSORS)
    own = lax.div(blocks - 1 - block, together) + 1

    def for_tiles(run: Callable[..., None]) -> None:
        """Calls it with the number of each tile's first step, its first token, its column."""

        def one(i: jax.Array, _: None) -> None:
            index = block + i * together
            # k is the inner axis: blocks that run together share rows of gradients.
            token = lax.div(index, jnp.int32(columns)) * tiles.tokens
            run(i * sum(lengths), token, lax.rem(index, jnp.int32(columns)))

        lax.fori_loop(0, own, one, None)

    @pl.when(lax.axis_index("warpgroup") < WARPGROUPS)
    def _() -> None:
        if not stand_ins:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        share = None
        if shared:
            own = [ref.at[lax.axis_index("warpgroup")] for ref in places]
            share = mosaic_gpu_share.Operands(*arrays, *own, start=0)
        for_tiles(partial(_multiply, tiles, operands, share, pipeline, out_ref, stand_ins))

    @pl.when(lax.axis_index("warpgroup") == WARPGROUPS)
    def _() -> None:
        if not stand_ins:
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
        for_tiles(partial(_copy, tiles, operands, pipeline))


def _copy(
    tiles: Tiles,
    operands: Sequence[Any],
    pipeline: Pipeline,
    count: jax.Array,
    token: jax.Array,
    column: jax.Array,
) -> None:
    """The steps of a tile to shared memory, as places get free."""
    for layer_ref, _, packed_ref, g_ref in operands:
        layer, steps = layer_ref[0], g_ref.shape[1] // STEP
        packed_bytes = pl.ds(column * BYTES, BYTES)
        tokens = pl.ds(token, tiles.tokens)

        def step(
            i: jax.Array,
            _: None,
            first: jax.Array = count,
            packed: Any = packed_ref.at[layer, :, packed_bytes],
            g: Any = g_ref.at[tokens],
        ) -> None:
            slot, n = pipeline.slot(first + i), pl.ds(i * STEP, STEP)

            @pl.when(first + i >= pipeline.stages)
            def _() -> None:
                plgpu.barrier_wait(pipeline.empty.at[slot])

            full = pipeline.full.at[slot]
            plgpu.copy_gmem_to_smem(packed.at[n], pipeline.packed.at[slot], full)
            plgpu.copy_gmem_to_smem(g.at[:, n], pipeline.gradients.at[slot], full)

        lax.fori_loop(0, steps, step, None)
        count = count + steps


def _multiply(
    tiles: Tiles,
    operands: Sequence[Any],
    share: Operands | None,
    pipeline: Pipeline,
    out_ref: Any,
    stand_ins: Sequence[Any],
    count: jax.Array,
    token: jax.Array,
    column: jax.Array,
) -> None:
    """A tile of the output: its products over all matrices, scaled, the share added, stored."""
    if share is not None:
        share.copy(token, column * WIDTH + lax.axis_index("warpgroup") * ROWS)
    acc = jnp.zeros((ROWS, tiles.tokens), jnp.float32)
    if not stand_ins:
        acc = plgpu.layout_cast(acc, plgpu.Layout.WGMMA)
    unit = jnp.float32(1)
    for i, (layer_ref, scale_ref, _, g_ref) in enumerate(operands):
        own = scale_ref[layer_ref[0] if scale_ref.shape[0] > 1 else 0]
        if i:
            own, ratio = _next_unit(unit, own)
            acc = acc * ratio
        unit, steps = own, g_ref.shape[1] // STEP
        run = partial(_accumulate, pipeline, stand_ins, count, steps)
        if stand_ins:
            acc = acc + _interpreted_sum(run, (ROWS, tiles.tokens))
        else:
            start: Any = plgpu.WGMMAAccumulatorRef.init(acc)
            acc = cast("jax.Array", pl.run_state(run)(start))
        count = count + steps
    acc = acc * (unit * UNIT)
    if share is not None:
        acc = share.add(acc, interpret=bool(stand_ins))
    _store(out_ref, acc, token, column, interpret=bool(stand_ins))


def _next_unit(unit: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The unit of the next matrix' sums, its scale, and what brings sums so far to it."""
    least = jnp.abs(unit) * LEAST_RATIO
    scale = jnp.where(jnp.abs(scale) < least, least, scale)
    return scale, jnp.where(scale == 0, jnp.float32(1), unit / scale)


def _accumulate(
    pipeline: Pipeline, stand_ins: Sequence[Any], count: jax.Array, steps: int, acc_ref: Any
) -> None:
    """Adds the products of a matrix' steps, whose copies have the numbers from ``count`` on."""

    def step(i: jax.Array) -> None:
        slot = pipeline.slot(count + i)
        plgpu.barrier_wait(pipeline.full.at[slot])
        packed, g = pipeline.packed.at[slot], pipeline.gradients.at[slot]
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
    """This warpgroup's rows of the register operand, [ROWS, STEP]."""
    layout = plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(_transforms(BYTES, 1)),),
        return_type=plgpu.ShapeDtypeStruct((ROWS, STEP), dtype, layout),
    )
    def codes(_: Any, ref: Any) -> Any:
        return transposed_codes(ref, (ROWS, STEP), dtype)

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
    codes = unpack_ternary2(packed, WIDTH).reshape(STEP, 4, 8, WARPGROUPS, 2, 2)
    own = lax.dynamic_index_in_dim(codes, lax.axis_index("warpgroup"), 3, keepdims=False)
    rows = own.transpose(3, 1, 4, 2, 0).reshape(ROWS, STEP)
    codes_smem[...] = rows.astype(codes_smem.dtype) * (1 / UNIT)
    g_smem[...] = g.T
    plgpu.wgmma(acc_ref, codes_smem, g_smem)


def _store(
    out_ref: Any, acc: jax.Array, token: jax.Array, column: jax.Array, *, interpret: bool
) -> None:
    """Accumulators [ROWS, tokens] of this warpgroup to their places, as far as there are such."""
    if interpret:
        tokens, warpgroup = acc.shape[1], lax.axis_index("warpgroup")
        values = acc.reshape(2, 4, 2, 8, tokens).transpose(4, 1, 3, 0, 2)
        runs = pl.ds(column * (ROWS // RUN), ROWS // RUN)
        rounded = values.reshape(tokens, -1, RUN).astype(out_ref.dtype)
        out_ref[pl.ds(token, tokens), runs, warpgroup] = rounded
        return
    scalar = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA, scalar, scalar))
    def store(_: Any, ref: Any, values: Any, token: Any, column: Any) -> None:
        store_permuted(ref, values, token, column, out_ref.dtype)

    cast("Callable[..., None]", store)(out_ref, acc, token, column * WIDTH)
