"""Packed bytes to int8 codes within the registers of a warp, at the level of the compiler.

A fragment of wgmma's 8-bit operand gives lane t of each four the columns 4t..4t+3 of every 16, as
one 32-bit register. Loaded in that layout, 16 packed bytes leave lane t with bytes 4t..4t+3; but
the codes of its columns in the four blocks of 16 that the bytes stand for are in bytes t, 4+t, 8+t
and 12+t. So the four lanes transpose their bytes, and each lane then spreads a byte to a register.
For four registers that takes 2 shuffles, 10 byte permutations (``prmt``, 4 of them as the table
that makes -1, 0, 1 of 0, 1, 2), 2 masks and 3 shifts.
"""

from typing import Any

CODES_OF_FIELDS = 0x000100FF
"""Byte i is the code that the field i stands for."""


def fragment_codes(fragment: Any, shape: tuple[int, int]) -> Any:
    """uint8 [R, B] as a ``FragmentedArray`` in ``WGMMA_8BIT`` to int8 [R, 4 B] in the same."""
    # Imported here: they are of the compiler, and not on every platform that imports the kernels.
    import numpy as np
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    word = ir.IntegerType.get_signless(32)
    lane = arith.remui(mgpu.utils.thread_idx(), _constant(4))
    high = arith.cmpi(arith.CmpIPredicate.uge, lane, _constant(2))
    odd = arith.cmpi(arith.CmpIPredicate.eq, arith.remui(lane, _constant(2)), _constant(1))
    pairs = arith.select(high, _constant(0x3276), _constant(0x5410))
    singles = arith.select(odd, _constant(0x3715), _constant(0x6240))

    registers = np.empty(fragment.layout.registers_shape(shape), dtype=object)
    for index, register in np.ndenumerate(fragment.registers):
        own = mgpu.utils.bitcast(register, word)
        own = mgpu.utils.prmt(own, mgpu.utils.shfl_bfly(own, 2), pairs)
        own = mgpu.utils.prmt(own, mgpu.utils.shfl_bfly(own, 1), singles)
        for byte, codes in enumerate(_spread(own)):
            place = (index[0], 4 * index[1] + byte, *index[2:])
            registers[place] = mgpu.utils.bitcast(codes, register.type)
    return mgpu.FragmentedArray(_registers=registers, _layout=fragment.layout, _is_signed=True)


def _spread(packed: Any) -> list[Any]:
    """The codes of each of the four bytes of a word, four to a word."""
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir.dialects import arith

    prmt = mgpu.utils.prmt
    table, fields = _constant(CODES_OF_FIELDS), _constant(0x33333333)
    # Two bits in each half of a byte, which is what prmt selects by, low 16 bits only.
    even = arith.andi(packed, fields)
    odd = arith.andi(arith.shrui(packed, _constant(2)), fields)
    words: list[Any] = []
    for half in range(2):
        if half:
            even, odd = (arith.shrui(value, _constant(16)) for value in (even, odd))
        evens, odds = prmt(table, table, even), prmt(table, table, odd)
        words += [prmt(evens, odds, _constant(0x5140)), prmt(evens, odds, _constant(0x7362))]
    return words


def _constant(value: int) -> Any:
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    word = ir.IntegerType.get_signless(32)
    return arith.constant(word, ir.IntegerAttr.get(word, value - (value >> 31 << 32)))


def transposed_codes(packed: Any, shape: tuple[int, int], dtype: Any) -> Any:
    """Packed bytes in shared memory to minus two codes, as the first operand of wgmma.

    A ``FragmentedArray`` in ``WGMMA``. Its row ``64 t + 16 w + 8 h + q`` has the codes of
    k = 64 w + 8 q + 4 g + 2 t + h, where g is the warpgroup and w a warp of it.

    Args:
        packed: uint8 [N, 64], its tiles [N / 8, 1, 8, 64] swizzled by 64 bytes.
        shape: [128, N].
        dtype: of two bytes, with eight or fewer bits of exponent: there 2 is 0x4000.
    """
    import numpy as np
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    word = ir.IntegerType.get_signless(32)
    thread = mgpu.utils.thread_idx()
    lane, warp = _masked(thread, 0, 31), _masked(thread, 5, 3)
    # A lane addresses row ``lane`` of 32, at the 16 bytes of its warp: those lie at the place that
    # the swizzle gives them, which depends on bits 1 and 2 of the row.
    place = arith.xori(warp, _masked(lane, 1, 3))
    offset = arith.addi(
        arith.shli(lane, _constant(6)),
        arith.shli(place, _constant(4)),
    )
    base = arith.addi(llvm.ptrtoint(word, mgpu.utils.memref_ptr(packed)), offset)
    field = arith.shli(_masked(thread, 7, 1), _constant(3))
    registers = np.empty(mgpu.WGMMA_LAYOUT.registers_shape(shape), dtype=object)
    flat = registers.reshape(shape[0] // 64, shape[1] // 8, 2)
    register_type = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(dtype))
    for step in range(shape[1] // 32):
        words = _transposed_words(arith.addi(base, _constant(2048 * step)))
        for i, own in enumerate(words):
            codes = arith.shrui(own, field)
            for row, half in np.ndindex(2, 2):
                spread = arith.shli(codes, _constant(14 - 2 * (2 * row + half)))
                spread = arith.andi(spread, _constant(0xC000C000))
                spread = arith.xori(spread, _constant(0x40004000))
                flat[row, 4 * step + i, half] = mgpu.utils.bitcast(spread, register_type)
    return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)


def store_permuted(out: Any, values: Any, token: Any, column: Any, dtype: Any) -> None:
    """Accumulators of :func:`transposed_codes` rows to where their k and tokens lie in memory.

    Args:
        out: [M, K / 8, 2, 4] of ``dtype``: runs of four k, of the two warpgroups in turn.
        values: float32 [128, T] in ``WGMMA``.
        token: of the first column of ``values``.
        column: k of the first row, of the first warpgroup.
        dtype: bfloat16 or float16.
    """
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    long = ir.IntegerType.get_signless(64)
    m, runs = ir.MemRefType(out.type).shape[:2]
    thread = mgpu.utils.thread_idx()
    quad = _masked(thread, 2, 7)
    k = arith.addi(
        arith.addi(column.registers.item(), arith.shli(_masked(thread, 5, 3), _constant(6))),
        arith.addi(arith.shli(quad, _constant(3)), arith.shli(_masked(thread, 7, 1), _constant(2))),
    )
    first = arith.addi(token.registers.item(), arith.shli(_masked(thread, 0, 3), _constant(1)))
    inside = arith.cmpi(arith.CmpIPredicate.slt, k, _constant(8 * runs))
    limit = arith.select(inside, _constant(m), _constant(0))
    row_bytes = arith.constant(long, ir.IntegerAttr.get(long, 16 * runs))
    base = llvm.ptrtoint(long, mgpu.utils.memref_ptr(out))
    base = arith.addi(base, arith.extui(long, arith.shli(k, _constant(1))))
    base = arith.addi(base, arith.muli(arith.extui(long, first), row_bytes))
    flat = values.registers.reshape(2, -1, 2)
    for block in range(flat.shape[1]):
        for one in range(2):
            ahead = arith.muli(
                row_bytes, arith.constant(long, ir.IntegerAttr.get(long, 8 * block + one))
            )
            row = arith.addi(first, _constant(8 * block + one))
            present = arith.extui(
                ir.IntegerType.get_signless(32), arith.cmpi(arith.CmpIPredicate.slt, row, limit)
            )
            run = [vector.extract(flat[t, block, h], [], [one]) for t in range(2) for h in range(2)]
            _store_run(arith.addi(base, ahead), run, present, dtype)


def _store_run(address: Any, run: Any, present: Any, dtype: Any) -> None:
    """Four floats as eight bytes, where ``present`` is not 0."""
    import numpy as np
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    kind = "bf16x2" if np.dtype(dtype).name == "bfloat16" else "f16x2"
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [address, *run, present],
        "{ .reg .pred p; .reg .b32 low, high; setp.ne.b32 p, $5, 0; "
        f"cvt.rn.{kind}.f32 low, $2, $1; cvt.rn.{kind}.f32 high, $4, $3; "
        "@p st.global.v2.b32 [$0], {low, high}; }",
        "l,f,f,f,f,r",
        has_side_effects=True,
    )


def _transposed_words(address: Any) -> list[Any]:
    """Four matrices of 8 x 8 words of 16 bits, transposed between lanes; two words a register."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    word = ir.IntegerType.get_signless(32)
    loaded: Any = llvm.inline_asm(
        llvm.StructType.get_literal([word] * 4),
        [address],
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,r",
        has_side_effects=True,
    )
    return [llvm.extractvalue(word, loaded, [i]) for i in range(4)]


def _masked(value: Any, shift: int, mask: int) -> Any:
    """Bits of a word from ``shift`` on."""
    from jaxlib.mlir.dialects import arith

    return arith.andi(arith.shrui(value, _constant(shift)), _constant(mask))
