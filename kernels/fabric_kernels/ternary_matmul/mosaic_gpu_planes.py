"""Products of codes in planes, for up to about a thousand tokens, where tiles are hard to fill.

``y^T[N, M] = codes[N, K] · x[M, K]^T`` by tiles of the output. What goes with 16 packed bytes lies
in planes, one for each field of a byte, so that masks of a packed word are the register operand: of
fields, which are codes plus one, and a token's sum is taken from its products.

One warpgroup of a block copies, for all its tiles in turn; two unpack and multiply, each its own
outputs. While the products of a step run, the next step is unpacked: registers of an operand may
not be written before its product is done, so steps take turns at two sets of them. Blocks of a
cluster may divide the sums of a tile (``mosaic_gpu_cluster``).
"""

import inspect
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
from fabric_kernels.ternary_matmul import mosaic_gpu_cluster
from fabric_kernels.ternary_matmul.mosaic_gpu_pipeline import (
    COMPUTE_REGISTERS,
    MEMORY_REGISTERS,
    SLOTS,
    TILE_ROWS,
    WARPGROUPS,
    Blocks,
    Pipeline,
    barriers,
    store_tokens,
    transforms,
)
from fabric_kernels.ternary_matmul.mosaic_gpu_planes_tiles import (
    PIECE_BYTES,
    SWIZZLE,
    Tiles,
    choose_tiles,
)
from fabric_kernels.ternary_matmul.mosaic_gpu_stack import padded_stack, round_up, whole_tiles
from fabric_kernels.ternary_matmul.mosaic_gpu_unpack import fragment_fields
from fabric_kernels.ternary_matmul.weight import TernaryWeight


@dataclass(frozen=True)
class Product:
    """What a kernel is made for.

    Attributes:
        tiles: how it is cut up.
        blocks: which of them a block has.
        steps: of a tile in a block.
        stages: of them in shared memory.
        scaled: whether products are multiplied by a factor.
        interpret: whether interpret mode runs it.
    """

    tiles: Tiles
    blocks: Blocks
    steps: int
    stages: int
    scaled: bool
    interpret: bool


def product(
    x: jax.Array,
    sums: jax.Array,
    weight: TernaryWeight,
    factor: jax.Array | None,
    dtype: jnp.dtype,
    *,
    m: int | None = None,
    tiles: Tiles | None = None,
    interpret: Any = None,
) -> jax.Array:
    """[m, N] in ``dtype``: the int32 product of ``x`` int8 [M, K], times ``factor`` f32 [M].

    M and K may be more than there are tokens and inputs, with zeros past those inputs.

    Args:
        x: codes, each 64 of a row in planes (``triton_group.turned``).
        sums: int32 [M], of each row.
        weight: ``ternary2``.
        factor: what products are multiplied with, or None.
        dtype: of the result.
        m: tokens, where they are fewer than M.
        tiles: sizes; chosen where None.
        interpret: parameters of interpret mode.
    """
    assert weight.packing == "ternary2", "the caller has looked"
    m, n = m or x.shape[0], weight.n
    tiles = tiles or choose_tiles(m, n, weight.k)
    # A block's second warpgroup may have no outputs; a cluster's, no inputs or no tokens to store.
    whole = whole_tiles if tiles.parts > 1 else round_up
    rows, outputs = whole(m, TILE_ROWS), whole_tiles(n, SWIZZLE // dtype.itemsize)
    if interpret:  # which has no tiles that end past an array, and no clusters
        tiles = replace(tiles, parts=1)
        rows, outputs = round_up(m, tiles.tokens), round_up(n, tiles.width)
    # Padding meets zeros of x, or makes outputs that are cut off.
    least = max(tiles.width, round_up(outputs if interpret else n, TILE_ROWS))
    width = max(tiles.bytes, whole(weight.packed.shape[-1], PIECE_BYTES))
    stack = padded_stack(weight, least, width)
    right = CODES_PER_BYTE * width - x.shape[1]
    below = max(rows, tiles.tokens) - x.shape[0]
    x = jnp.pad(x, ((0, max(0, below)), (0, max(0, right))))
    operands = [stack.layer, stack.packed, x]
    for of_tokens in (sums,) if factor is None else (sums, factor):
        operands.append(
            jnp.pad(of_tokens, (0, max(0, round_up(rows, tiles.tokens) - len(of_tokens))))
        )
    scaled = factor is not None
    call = _call(tiles, (rows, outputs), width, dtype, interpret, scaled=scaled)
    return call(*operands)[:m, :n]


def _call(
    tiles: Tiles,
    shape: tuple[int, int],
    width: int,
    dtype: jnp.dtype,
    interpret: Any,
    *,
    scaled: bool,
) -> Callable[..., jax.Array]:
    """The kernel as a function of layer, stack [L, N, width], activations, sums, and factors.

    Factors where it is ``scaled``; ``shape`` is of the output, [M, N].
    """
    stages = tiles.stages(dtype.itemsize)
    blocks = Blocks(shape, tiles.tokens, tiles.width, tiles.parts)
    product = Product(tiles, blocks, tiles.steps(width), stages, scaled, bool(interpret))
    rows = transforms(SWIZZLE, 1)
    scratch: list[Any] = [
        plgpu.SMEM(
            (stages, tiles.width, tiles.bytes), jnp.uint8, transforms=transforms(tiles.bytes, 1)
        ),
        plgpu.SMEM((stages, tiles.tokens, tiles.codes), jnp.int8, transforms=rows),
        *barriers(stages),
        plgpu.SMEM(
            (WARPGROUPS, SLOTS, store_tokens(tiles.stored, dtype.itemsize), tiles.outputs),
            dtype,
            transforms=transforms(SWIZZLE, dtype.itemsize),
        ),
    ]
    if tiles.parts > 1:
        sizes = tiles.parts, tiles.outputs, tiles.tokens
        scratch.append(mosaic_gpu_cluster.scratch(*sizes, jnp.int32))
    options: dict[str, Any] = {}
    if interpret:
        options["interpret"] = interpret
        for operand in ((tiles.outputs, SWIZZLE), (SWIZZLE, tiles.tokens)):
            scratch.append(plgpu.SMEM((WARPGROUPS, *operand), jnp.int8))
    else:
        semantics = plgpu.LoweringSemantics.Warpgroup
        options["compiler_params"] = plgpu.CompilerParams(lowering_semantics=semantics)
    return plgpu.kernel(
        partial(_kernel, product),
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        scratch_types=scratch,
        **product.blocks.grid,
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        **options,
    )


@dataclass(frozen=True)
class Memory:
    """What a warpgroup that computes reads and writes, but for the pipeline.

    Attributes:
        out: of the output, in device memory.
        out_smem: stores under way, [warpgroups, slots, tokens, outputs].
        sums: what is taken from the products of each token.
        factors: none or one array of what multiplies them then.
        received: none or one array of what other blocks of the cluster send.
        stand_ins: operands of products in interpret mode, otherwise none.
    """

    out: Any
    out_smem: Any
    sums: Any
    factors: Sequence[Any]
    received: Sequence[Any]
    stand_ins: Sequence[Any]


def _kernel(product: Product, *refs: Any) -> None:
    """Every block: its tiles of the output in turn, copied for by one warpgroup."""
    tiles, rest = product.tiles, list(refs)

    def take(count: int) -> list[Any]:
        found = rest[:count]
        del rest[:count]
        return found

    layer_ref, packed_ref, x_ref, sums_ref = take(4)
    factors, (out_ref,) = take(product.scaled), take(1)
    packed, rows, full, empty, out_smem = take(5)
    pipeline = Pipeline(packed, rows, full, empty, product.stages)
    warpgroup = lax.axis_index("warpgroup")
    received = take(tiles.parts > 1)
    memory = Memory(out_ref, out_smem, sums_ref, factors, received, rest)

    @pl.when(warpgroup < WARPGROUPS)
    def _() -> None:
        if not product.interpret:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        product.blocks.each(product.steps, partial(_multiply, product, pipeline, memory))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(warpgroup == WARPGROUPS)
    def _() -> None:
        if not product.interpret:
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
        own = packed_ref.at[layer_ref[0]]
        product.blocks.each(product.steps, partial(_copy, product, pipeline, own, x_ref))
        if tiles.parts > 1:
            mosaic_gpu_cluster.take_part()


def _copy(
    product: Product,
    pipeline: Pipeline,
    packed: Any,
    x: Any,
    count: jax.Array,
    token: jax.Array,
    column: jax.Array,
) -> None:
    """The steps of a tile to shared memory, as places get free."""
    tiles = product.tiles
    first = product.blocks.part * product.steps

    def step(i: jax.Array, _: None) -> None:
        at = first + i
        pipeline.fill(
            count + i,
            packed.at[
                pl.ds(column * tiles.width, tiles.width), pl.ds(at * tiles.bytes, tiles.bytes)
            ],
            x.at[pl.ds(token, tiles.tokens), pl.ds(at * tiles.codes, tiles.codes)],
        )

    lax.fori_loop(0, product.steps, step, None)


def _multiply(
    product: Product,
    pipeline: Pipeline,
    memory: Memory,
    count: jax.Array,
    token: jax.Array,
    column: jax.Array,
) -> None:
    """A tile of the output: its sums, over the cluster, scaled, stored."""
    tiles = product.tiles
    output = column * tiles.width + lax.axis_index("warpgroup") * tiles.outputs
    token = token + product.blocks.part * tiles.stored

    def run(acc_ref: Any) -> jax.Array:
        _accumulate(product, pipeline, memory.stand_ins, count, acc_ref)
        return acc_ref[...]

    shape = (tiles.outputs, tiles.tokens)
    acc = pl.run_scoped(run, plgpu.WGMMAAccumulatorRef(shape, jnp.int32))
    if memory.received:
        acc = mosaic_gpu_cluster.sum_of_parts(memory.received[0], acc, tiles.parts)
    _store(product, memory, acc, token, output)


def _accumulate(
    product: Product, pipeline: Pipeline, stand_ins: Sequence[Any], count: jax.Array, acc_ref: Any
) -> None:
    """The sums of the steps whose copies have the numbers from ``count`` on."""
    tiles, warpgroup = product.tiles, lax.axis_index("warpgroup")
    rows, pieces = pl.ds(warpgroup * tiles.outputs, tiles.outputs), tiles.codes // SWIZZLE

    def step(i: jax.Array) -> None:
        slot = pipeline.slot(count + i)
        plgpu.barrier_wait(pipeline.full.at[slot])
        packed = pipeline.packed.at[slot]
        for piece in range(pieces):
            codes = pipeline.rows.at[slot].at[:, pl.ds(piece * SWIZZLE, SWIZZLE)]
            if stand_ins:
                own = [ref.at[warpgroup] for ref in stand_ins]
                part = packed[rows, pl.ds(piece * PIECE_BYTES, PIECE_BYTES)]
                _interpreted_product(acc_ref, part, codes[...], *own)
            else:
                unpacked = _unpack(packed, piece, tiles)
                plgpu.wgmma(acc_ref, unpacked, codes.transpose((1, 0)))
        # All but this step's products are done: the place of the step before is free.
        plgpu.wgmma_wait(pieces)

        @pl.when(i > 0)
        def _() -> None:
            plgpu.barrier_arrive(pipeline.empty.at[pipeline.slot(count + i - 1)])

    def pair(i: jax.Array, _: None) -> None:
        # Two in a turn of the loop have the compiler give them registers of their own.
        step(2 * i)
        step(2 * i + 1)

    steps = product.steps
    lax.fori_loop(0, steps // 2, pair, None)
    if steps % 2:
        step(jnp.int32(steps - 1))
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(pipeline.empty.at[pipeline.slot(count + steps - 1)])


def _unpack(packed_ref: Any, piece: int, tiles: Tiles) -> jax.Array:
    """A piece of this warpgroup's fields, [outputs, 128] int8, of a step [width, bytes]."""
    layout, shape = plgpu.Layout.WGMMA_8BIT, (tiles.outputs, SWIZZLE)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(transforms(tiles.bytes, 1)),),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.int8, layout),
    )
    def fields(_: Any, ref: Any) -> Any:
        return fragment_fields(ref, shape, piece)

    return cast("Callable[[Any], jax.Array]", fields)(packed_ref)


def _interpreted_product(
    acc_ref: Any, packed: jax.Array, codes: jax.Array, fields_smem: Any, codes_smem: Any
) -> None:
    """The product of what ``_unpack`` makes; interpret mode takes whole references only."""
    fields = unpack_ternary2(packed, packed.shape[1] * CODES_PER_BYTE) + 1
    planes = fields.reshape(len(packed), -1, 16, CODES_PER_BYTE).swapaxes(2, 3)
    fields_smem[...] = planes.reshape(fields_smem.shape)
    codes_smem[...] = codes.T
    plgpu.wgmma(acc_ref, fields_smem, codes_smem)


def _store(
    product: Product, memory: Memory, acc: jax.Array, token: jax.Array, output: jax.Array
) -> None:
    """Takes sums from ``acc`` int32 [outputs, tokens], scales it and writes it, transposed."""
    interpret = product.interpret
    own, store = memory.out_smem.at[lax.axis_index("warpgroup")], memory.out_smem.shape[2]
    for part in range(acc.shape[1] // store):
        tokens = pl.ds(token + part * store, store)
        values = acc[:, part * store : (part + 1) * store]
        values = values - _of_tokens(memory.sums.at[tokens], values.shape, interpret)
        for ref in memory.factors:
            factor = _of_tokens(ref.at[tokens], values.shape, interpret)
            values = values.astype(jnp.float32) * factor
        values = values.astype(memory.out.dtype)
        slot = own.at[part % SLOTS]
        plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
        if interpret:
            slot[...] = values.T
        else:
            values = plgpu.layout_cast(values, plgpu.Layout.WGMMA_TRANSPOSED)
            slot.transpose((1, 0))[...] = values
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(slot, memory.out.at[tokens, pl.ds(output, values.shape[0])])


def _of_tokens(ref: Any, shape: tuple[int, ...], interpret: bool) -> jax.Array:
    """One value a token, along the second axis of ``shape``."""
    if interpret:
        return lax.broadcast_in_dim(ref[...], shape, (1,))
    values = _load(ref, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
    return lax.broadcast_in_dim(values, shape, (1,))


def _load(ref: Any, **options: Any) -> jax.Array:
    """``plgpu.load`` of all of ``ref``: jax 0.10 wants an index beside it, jax 0.11 none."""
    wanted = inspect.signature(plgpu.load).parameters["idx"].default is inspect.Parameter.empty
    return plgpu.load(ref, *([()] if wanted else []), **options)
