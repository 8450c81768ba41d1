"""Products of int8 codes in rows of k, for any number of tokens, with an adapter's share.

``y^T[N, M] = codes[N, K] · x[M, K]^T`` by tiles of the output. One warpgroup of a block copies, the
others unpack packed bytes to int8 codes in the fragments of the register operand, and multiply:
while one of them unpacks, the products of the other run. The pipeline is Pallas' own.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fabric_kernels.packing import CODES_PER_BYTE, unpack_ternary2
from fabric_kernels.ternary_matmul import mosaic_gpu_share
from fabric_kernels.ternary_matmul.mosaic_gpu_pipeline import (
    MEMORY_REGISTERS,
    MULTIPROCESSORS,
    TILE_ROWS,
    transforms,
)
from fabric_kernels.ternary_matmul.mosaic_gpu_rows_tiles import (
    PIECE_BYTES,
    SWIZZLE,
    Tiles,
    choose_tiles,
)
from fabric_kernels.ternary_matmul.mosaic_gpu_share import Operands, Share
from fabric_kernels.ternary_matmul.mosaic_gpu_stack import padded_stack, round_up
from fabric_kernels.ternary_matmul.mosaic_gpu_unpack import fragment_codes
from fabric_kernels.ternary_matmul.weight import TernaryWeight


def product(
    x: jax.Array,
    weight: TernaryWeight,
    factor: jax.Array | None,
    dtype: jnp.dtype,
    *,
    m: int | None = None,
    tiles: Tiles | None = None,
    share: Share | None = None,
    interpret: Any = None,
) -> jax.Array:
    """[m, N] in ``dtype``: the int32 product of ``x`` int8 [M, K], times ``factor`` f32 [M].

    A share, which wants a factor, is added. M and K may be more than there are tokens and inputs,
    with zeros past those inputs.
    """
    assert weight.packing == "ternary2", "the caller has looked"
    m, n = m or x.shape[0], weight.n
    tiles = tiles or choose_tiles(m, n)
    tiles = tiles if share is None else tiles.beside_share()
    # Padding meets zeros of x, or makes outputs that are cut off.
    least = max(tiles.width, round_up(n, TILE_ROWS))
    width = max(tiles.bytes, round_up(weight.packed.shape[-1], PIECE_BYTES))
    stack = padded_stack(weight, least, width)
    rows = max(tiles.tokens, round_up(m, TILE_ROWS))
    right = CODES_PER_BYTE * width - x.shape[1]
    x = jnp.pad(x, ((0, max(0, rows - x.shape[0])), (0, max(0, right))))
    operands = [stack.layer, stack.packed, x]
    if factor is not None:
        operands.append(jnp.pad(factor, (0, max(0, round_up(rows, tiles.tokens) - len(factor)))))
    outputs = round_up(least, SWIZZLE // dtype.itemsize)
    if share is not None:
        right = max(tiles.width, round_up(n, mosaic_gpu_share.RANK)) - n
        operands.append(jnp.pad(share.narrow, ((0, rows - m), (0, 0))))
        operands.append(jnp.pad(share.b, ((0, 0), (0, right))))
    start = None if share is None else share.start
    call = _call(tiles, (rows, outputs), dtype, (factor is not None, start), interpret)
    return call(*operands)[:m, :n]


def _call(
    tiles: Tiles,
    shape: tuple[int, int],
    dtype: jnp.dtype,
    extra: tuple[bool, int | None],
    interpret: Any,
) -> Callable[..., jax.Array]:
    """The kernel as a function of layer, stack, activations and what is ``extra``.

    These are factors, and narrow products, from one of their columns on, with B.
    """
    blocks = pl.cdiv(shape[0], tiles.tokens) * pl.cdiv(shape[1], tiles.width)
    slots = tiles.slots * 4 // dtype.itemsize
    out_shape = (tiles.warpgroups, slots, tiles.store, tiles.outputs)
    scratch = [plgpu.SMEM(out_shape, dtype, transforms=transforms(SWIZZLE, dtype.itemsize))]
    if extra[1] is not None:
        scratch += mosaic_gpu_share.scratch(tiles.warpgroups, tiles.tokens, tiles.outputs)
    options: dict[str, Any] = {}
    if interpret:
        options["interpret"] = interpret
        for operand in ((tiles.outputs, SWIZZLE), (SWIZZLE, tiles.tokens)):
            scratch.append(plgpu.SMEM((tiles.warpgroups, *operand), jnp.int8))
    else:
        semantics = plgpu.LoweringSemantics.Warpgroup
        options["compiler_params"] = plgpu.CompilerParams(lowering_semantics=semantics)
    return plgpu.kernel(
        partial(_kernel, tiles, *extra),
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        scratch_types=scratch,
        grid=(min(blocks, MULTIPROCESSORS),),
        grid_names=("block",),
        num_threads=tiles.warpgroups + 1,
        thread_name="warpgroup",
        **options,
    )


def _kernel(tiles: Tiles, scaled: bool, share: int | None, *refs: Any) -> None:
    """Every block: its tiles of the output in turn, each a pipeline over k and an epilogue."""
    layer_ref, packed_ref, x_ref = refs[:3]
    factors, refs = refs[3 : 3 + scaled], refs[3 + scaled :]
    arrays, (out_ref, out_smem, *stand_ins) = ((), refs) if share is None else (refs[:2], refs[2:])
    places, stand_ins = ((), stand_ins) if share is None else (stand_ins[:3], stand_ins[3:])
    (m, n), steps = out_ref.shape, pl.cdiv(packed_ref.shape[2], tiles.bytes)
    columns = pl.cdiv(n, tiles.width)
    pipeline = partial(_pipeline, tiles, steps, stand_ins)

    def nothing(*_: Any, **__: Any) -> None:
        """Stands for a body where only the buffers are asked for."""

    layer = layer_ref[0]
    buffers = pipeline(nothing).get_allocations(packed_ref.at[layer], x_ref)

    @partial(pl.run_scoped, buffers=buffers, collective_axes="warpgroup")
    def _(buffers: Any) -> None:
        @plgpu.nd_loop((pl.cdiv(m, tiles.tokens) * columns,), collective_axes="block")
        def _(loop: Any) -> None:
            (index,) = loop.index
            # Outputs are the inner axis: packed weights are small and stay in the L2 cache.
            token = lax.div(index, columns) * tiles.tokens
            output = lax.rem(index, columns) * tiles.width
            epilogue = partial(_epilogue, tiles, bool(stand_ins), token, output)

            def compute(run: Callable[[Any], Any]) -> None:
                warpgroup = lax.axis_index("warpgroup")
                operands = None
                if share is not None:
                    own = [ref.at[warpgroup] for ref in places]
                    operands = mosaic_gpu_share.Operands(*arrays, *own, start=share)
                    operands.copy(token, output + warpgroup * tiles.outputs)

                @partial(
                    pl.run_scoped,
                    acc_ref=plgpu.WGMMAAccumulatorRef((tiles.outputs, tiles.tokens), jnp.int32),
                )
                def _(acc_ref: Any) -> None:
                    run(acc_ref)
                    epilogue(factors, operands, out_ref, out_smem, acc_ref[...])

            pipeline(compute)(
                packed_ref.at[layer, pl.ds(output, tiles.width)],
                x_ref.at[pl.ds(token, tiles.tokens)],
                allocations=buffers,
            )

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _pipeline(
    tiles: Tiles, steps: int, stand_ins: Sequence[Any], compute: Callable[..., None]
) -> Any:
    """Copies of weights and activations by one warpgroup, unpacking and products by the others."""

    def body(_: Any, packed_smem: Any, x_smem: Any, acc_ref: Any) -> Any:
        rows = pl.ds(lax.axis_index("warpgroup") * tiles.outputs, tiles.outputs)
        for part in range(tiles.codes // SWIZZLE):
            packed = packed_smem[rows, pl.ds(part * PIECE_BYTES, PIECE_BYTES)]
            codes = x_smem.at[:, pl.ds(part * SWIZZLE, SWIZZLE)]
            if stand_ins:
                mine = [ref.at[lax.axis_index("warpgroup")] for ref in stand_ins]
                _interpreted_product(acc_ref, packed, codes[...], *mine)
            else:
                plgpu.wgmma(acc_ref, _unpack(packed), codes.transpose((1, 0)))
        # Registers of an operand may not be written before its product is done: each piece of a
        # step has its own, and the next step waits.
        plgpu.wgmma_wait(0)
        return acc_ref

    return plgpu.emit_pipeline_warp_specialized(
        body,
        grid=(steps,),
        memory_registers=MEMORY_REGISTERS,
        in_specs=[
            plgpu.BlockSpec(
                (tiles.width, tiles.bytes),
                lambda k: (0, k),
                transforms=transforms(PIECE_BYTES, 1),
            ),
            plgpu.BlockSpec(
                (tiles.tokens, tiles.codes),
                lambda k: (0, k),
                transforms=transforms(SWIZZLE, 1),
            ),
        ],
        wg_axis="warpgroup",
        num_compute_wgs=tiles.warpgroups,
        max_concurrent_steps=tiles.stages,
        compute_context=compute,
    )


def _unpack(packed: jax.Array) -> jax.Array:
    """uint8 [R, B] to the int8 codes [R, 4 B], both in the layout of a wgmma fragment."""
    layout = plgpu.Layout.WGMMA_8BIT
    shape = (packed.shape[0], packed.shape[1] * CODES_PER_BYTE)

    @plgpu.inline_mgpu(
        arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(shape, jnp.int8, layout)
    )
    def codes(_: Any, fragment: Any) -> Any:
        return fragment_codes(fragment, shape)

    return cast("Callable[[jax.Array], jax.Array]", codes)(packed)


def _interpreted_product(
    acc_ref: Any, packed: jax.Array, codes: jax.Array, unpacked_smem: Any, codes_smem: Any
) -> None:
    """The product of what ``_unpack`` makes; interpret mode takes whole references only."""
    unpacked_smem[...] = unpack_ternary2(packed, packed.shape[1] * CODES_PER_BYTE)
    codes_smem[...] = codes.T
    plgpu.wgmma(acc_ref, unpacked_smem, codes_smem)


def _epilogue(
    tiles: Tiles,
    interpret: bool,
    token: jax.Array,
    output: jax.Array,
    factors: Sequence[Any],
    share: Operands | None,
    out_ref: Any,
    out_smem: Any,
    acc: jax.Array,
) -> None:
    """Scales ``acc`` int32 [outputs, tokens], adds the share and writes it, transposed."""
    warpgroup, slots = lax.axis_index("warpgroup"), out_smem.shape[1]
    if share is not None:
        factor = _of_tokens(factors[0].at[pl.ds(token, tiles.tokens)], acc.shape, interpret)
        acc = share.add(acc.astype(jnp.float32) * factor, interpret=interpret)
        factors = ()
    for part in range(tiles.tokens // tiles.store):
        first = part * tiles.store
        tokens = pl.ds(token + first, tiles.store)
        values = acc[:, first : first + tiles.store]
        for ref in factors:
            factor = _of_tokens(ref.at[tokens], values.shape, interpret)
            values = values.astype(jnp.float32) * factor
        values = values.astype(out_ref.dtype)
        slot = out_smem.at[warpgroup, part % slots]
        plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
        if interpret:
            slot[...] = values.T
        else:
            values = plgpu.layout_cast(values, plgpu.Layout.WGMMA_TRANSPOSED)
            slot.transpose((1, 0))[...] = values
        plgpu.commit_smem()
        outputs = pl.ds(output + warpgroup * tiles.outputs, tiles.outputs)
        plgpu.copy_smem_to_gmem(slot, out_ref.at[tokens, outputs])


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
