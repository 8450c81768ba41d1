"""Sums over the blocks of a cluster, at the level of the compiler.

Each block has sums of a whole tile over its part of an axis, and ends with the whole sums of some
of the tokens: it writes what it has of the tokens of each block to the shared memory of that one,
waits for the others and adds up what it was sent, always in the order of the blocks.
"""

from collections.abc import Callable
from typing import Any, cast

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from fabric_kernels.ternary_matmul.mosaic_gpu_pipeline import WARPGROUPS
from fabric_kernels.ternary_matmul.mosaic_gpu_unpack import constant, masked

THREADS = 128
"""Of a warpgroup."""
WORDS = 4
"""Accumulators that a thread has of eight tokens and 64 outputs: they are written together."""


def scratch(parts: int, outputs: int, tokens: int, dtype: Any) -> Any:
    """Shared memory of what a block is sent: [parts, warpgroups, n, 128, 4]."""
    count = outputs * tokens // parts // (THREADS * WORDS)
    return plgpu.SMEM((parts, WARPGROUPS, count, THREADS, WORDS), dtype)


def sum_of_parts(received: Any, acc: jax.Array, parts: int) -> jax.Array:
    """[outputs, tokens] of this block to the sums [outputs, tokens / parts] of its tokens.

    Of int32 or float32, whole accumulators of ``WARPGROUPS`` warpgroups; once in a kernel.
    """
    outputs, tokens = acc.shape
    layout = plgpu.Layout.WGMMA
    shape = plgpu.ShapeDtypeStruct((outputs, tokens // parts), acc.dtype, layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout), return_type=shape)
    def total(_: Any, ref: Any, values: Any) -> Any:
        _send(ref, values, parts)
        _wait_for_cluster()
        return _collect(ref, values, parts)

    return cast("Callable[..., jax.Array]", total)(received, acc)


def take_part() -> None:
    """What threads that don't compute do meanwhile: they are waited for too."""

    @plgpu.inline_mgpu()
    def wait(_: Any) -> None:
        _wait_for_cluster()

    cast("Callable[[], None]", wait)()


def _send(ref: Any, values: Any, parts: int) -> None:
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    word = ir.IntegerType.get_signless(32)
    letter = "f" if values.mlir_dtype == ir.F32Type.get() else "r"
    flat, each = values.registers.reshape(values.shape[0] // 64, -1, 2), _each(values, parts)
    own: Any = llvm.inline_asm(word, [], "mov.u32 $0, %cluster_ctarank;", "=r")
    of_part = constant(WARPGROUPS * each * THREADS * 16)
    base = arith.addi(_address(ref, each), arith.muli(own, of_part))
    blocks = flat.shape[1] // parts
    for part in range(parts):
        remote: Any = llvm.inline_asm(
            word, [base, constant(part)], "mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r"
        )
        for i in range(each):
            row, block = divmod(i, blocks)
            pairs = flat[row, part * blocks + block]
            words = [vector.extract(pair, [], [j]) for pair in pairs for j in range(2)]
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [arith.addi(remote, constant(i * THREADS * 16)), *words],
                "st.shared::cluster.v4.b32 [$0], {$1, $2, $3, $4};",
                ",".join(["r"] + [letter] * WORDS + ["~{memory}"]),
                has_side_effects=True,
            )


def _collect(ref: Any, values: Any, parts: int) -> Any:
    import numpy as np
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    word = values.mlir_dtype
    letter, add = "r", arith.addi
    if word == ir.F32Type.get():
        letter, add = "f", arith.addf
    each, base = _each(values, parts), _address(ref, _each(values, parts))
    shape = (values.shape[0], values.shape[1] // parts)
    registers = np.empty(values.layout.registers_shape(shape), dtype=object)
    flat = registers.reshape(shape[0] // 64, -1, 2)
    pair = ir.VectorType.get((2,), word)
    for i in range(each):
        total: list[Any] = []
        for part in range(parts):
            place = (part * WARPGROUPS * each + i) * THREADS * 16
            loaded: Any = llvm.inline_asm(
                llvm.StructType.get_literal([word] * 4),
                [arith.addi(base, constant(place))],
                "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];",
                ",".join([f"={letter}"] * WORDS + ["r", "~{memory}"]),
                has_side_effects=True,
            )
            words = [llvm.extractvalue(word, loaded, [j]) for j in range(4)]
            total = [add(*both) for both in zip(total, words, strict=True)] if part else words
        row, block = divmod(i, flat.shape[1])
        for half in range(2):
            both = llvm.mlir_undef(pair)
            for j in range(2):
                both = vector.insert(
                    total[2 * half + j], both, dynamic_position=[], static_position=[j]
                )
            flat[row, block, half] = both
    return mgpu.FragmentedArray(
        _registers=registers, _layout=values.layout, _is_signed=values.is_signed
    )


def _each(values: Any, parts: int) -> int:
    """Vectors of a thread for a block."""
    return values.shape[0] * values.shape[1] // parts // (THREADS * WORDS)


def _address(ref: Any, each: int) -> Any:
    """Of this thread's first vector in the shared memory of its own block."""
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    word = ir.IntegerType.get_signless(32)
    thread = mgpu.utils.thread_idx()
    warpgroup = arith.muli(masked(thread, 7, 1), constant(each * THREADS * 16))
    lane = arith.shli(masked(thread, 0, THREADS - 1), constant(4))
    base = llvm.ptrtoint(word, mgpu.utils.memref_ptr(ref))
    return arith.addi(base, arith.addi(warpgroup, lane))


def _wait_for_cluster() -> None:
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [],
        "barrier.cluster.arrive.release; barrier.cluster.wait.acquire;",
        "~{memory}",
        has_side_effects=True,
    )
