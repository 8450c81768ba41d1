"""Packed bytes to codes or fields in the registers of a warp, at the level of the compiler.

A fragment of wgmma's 8-bit operand gives lane t of each four the columns 4t..4t+3 of every 16, as
one 32-bit register. Loaded in that layout, 16 packed bytes leave lane t with bytes 4t..4t+3; but
the codes of its columns in the four blocks of 16 that the bytes stand for are in bytes t, 4+t, 8+t
and 12+t. So the four lanes transpose their bytes, and each lane then spreads a byte to a register.
For four registers that takes 2 shuffles, 10 byte permutations (``prmt``, 4 of them as the table
that makes -1, 0, 1 of 0, 1, 2), 2 masks and 3 shifts. Where what meets the codes lies in planes, 4
masks and 3 shifts are all (:func:`fragment_fields`).
"""

from itertools import product
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
    lane = arith.remui(mgpu.utils.thread_idx(), constant(4))
    high = arith.cmpi(arith.CmpIPredicate.uge, lane, constant(2))
    odd = arith.cmpi(arith.CmpIPredicate.eq, arith.remui(lane, constant(2)), constant(1))
    pairs = arith.select(high, constant(0x3276), constant(0x5410))
    singles = arith.select(odd, constant(0x3715), constant(0x6240))

    registers = np.empty(fragment.layout.registers_shape(shape), dtype=object)
    for index, register in np.ndenumerate(fragment.registers):
        own = mgpu.utils.bitcast(register, word)
        own = mgpu.utils.prmt(own, mgpu.utils.shfl_bfly(own, 2), pairs)
        own = mgpu.utils.prmt(own, mgpu.utils.shfl_bfly(own, 1), singles)
        for byte, codes in enumerate(_spread(own)):
            place = (index[0], 4 * index[1] + byte, *index[2:])
            registers[place] = mgpu.utils.bitcast(codes, register.type)
    return mgpu.FragmentedArray(_registers=registers, _layout=fragment.layout, _is_signed=True)


def fragment_fields(packed: Any, shape: tuple[int, int], piece: int) -> Any:
    """Packed bytes in shared memory to fields, codes plus one, int8 in ``WGMMA_8BIT``.

    Those of each 16 bytes in planes, the first fields of all first: what a lane has of 16 bytes are
    its own four registers then, by masks.

    Args:
        packed: uint8 [2 R, B] of both warpgroups, B up to 128; tiles [R / 4, 1, 8, B] swizzled by
            B bytes.
        shape: [R, 128], of a warpgroup's fields.
        piece: which 32 of the bytes.
    """
    import numpy as np
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    word = ir.IntegerType.get_signless(32)
    width = ir.MemRefType(packed.type).shape[-1]
    rows = _fragment_rows(packed, shape[0], width)
    layout = mgpu.WGMMA_LAYOUT_8BIT
    registers = np.empty(layout.registers_shape(shape), dtype=object)
    flat = registers.reshape(shape[0] // 64, 8, 2)
    register_type = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
    for block, half in np.ndindex(shape[0] // 64, 2):
        for i in range(2):
            address = rows(block, half, 2 * piece + i)
            own: Any = llvm.inline_asm(
                word, [address], "ld.shared.b32 $0, [$1];", "=r,r,~{memory}", has_side_effects=True
            )
            for byte, fields in enumerate(_planes(own)):
                flat[block, 4 * i + byte, half] = mgpu.utils.bitcast(fields, register_type)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)


def _fragment_rows(packed: Any, count: int, width: int) -> Any:
    """Address of this lane's word among 16 bytes of a row: by block of 64, half of 8 and place."""
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    word = ir.IntegerType.get_signless(32)
    thread = mgpu.utils.thread_idx()
    row = arith.addi(
        arith.muli(masked(thread, 7, 1), constant(count)),
        arith.addi(arith.shli(masked(thread, 5, 3), constant(4)), masked(thread, 2, 7)),
    )
    base = llvm.ptrtoint(word, mgpu.utils.memref_ptr(packed))
    base = arith.addi(base, arith.muli(row, constant(width)))
    base = arith.addi(base, arith.shli(masked(thread, 0, 3), constant(2)))
    # The place of 16 bytes in a row depends on these bits of the row, of a swizzle of that width.
    turn = masked(row, {32: 2, 64: 1, 128: 0}[width], width // 16 - 1)

    def address(block: int, half: int, place: int) -> Any:
        offset = arith.shli(arith.xori(turn, constant(place)), constant(4))
        return arith.addi(base, arith.addi(offset, constant((64 * block + 8 * half) * width)))

    return address


def _planes(packed: Any) -> list[Any]:
    """The first field of each byte of a word, the second of each, and so on."""
    from jaxlib.mlir.dialects import arith

    shifted = [packed, *(arith.shrui(packed, constant(2 * j)) for j in (1, 2, 3))]
    return [arith.andi(word, constant(0x03030303)) for word in shifted]


def _spread(packed: Any) -> list[Any]:
    """The codes of each of the four bytes of a word, four to a word."""
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir.dialects import arith

    prmt = mgpu.utils.prmt
    table, fields = constant(CODES_OF_FIELDS), constant(0x33333333)
    # Two bits in each half of a byte, which is what prmt selects by, low 16 bits only.
    even = arith.andi(packed, fields)
    odd = arith.andi(arith.shrui(packed, constant(2)), fields)
    words: list[Any] = []
    for half in range(2):
        if half:
            even, odd = (arith.shrui(value, constant(16)) for value in (even, odd))
        evens, odds = prmt(table, table, even), prmt(table, table, odd)
        words += [prmt(evens, odds, constant(0x5140)), prmt(evens, odds, constant(0x7362))]
    return words


def constant(value: int) -> Any:
    """Of 32 bits, with or without a sign."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    word = ir.IntegerType.get_signless(32)
    return arith.constant(word, ir.IntegerAttr.get(word, value - (value >> 31 << 32)))


def transposed_codes(packed: Any, outputs: int, dtype: Any) -> Any:
    """Packed bytes to minus two codes, as the first operand of wgmma.

    A ``FragmentedArray`` [64, N] in ``WGMMA``. Its row ``16 w + 8 h + q`` has the codes of
    k = 64 g + 8 q + 2 w + h, where g is the warpgroup and w a warp of it.

    Args:
        packed: uint8 [N, 32] of both warpgroups; tiles [N / 8, 1, 8, 32] swizzled by 32 bytes.
        outputs: N.
        dtype: of two bytes, with eight or fewer bits of exponent: there 2 is 0x4000.
    """
    import numpy as np
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    word = ir.IntegerType.get_signless(32)
    thread = mgpu.utils.thread_idx()
    lane, warp = masked(thread, 0, 31), masked(thread, 5, 3)
    base = llvm.ptrtoint(word, mgpu.utils.memref_ptr(packed))
    base = arith.addi(base, arith.shli(lane, constant(5)))
    # A lane addresses row ``lane`` of 32, at the 16 bytes of its warpgroup: those lie at the place
    # that the swizzle gives them, which depends on bit 2 of the row.
    place = arith.xori(masked(thread, 7, 1), masked(lane, 2, 1))
    first = arith.subi(constant(14), arith.shli(warp, constant(2)))
    shifts = first, arith.subi(first, constant(2))
    registers = np.empty(mgpu.WGMMA_LAYOUT.registers_shape((64, outputs)), dtype=object)
    flat = registers.reshape(outputs // 8, 2)
    register_type = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(dtype))
    for step in range(outputs // 32):
        offset = arith.addi(arith.shli(place, constant(4)), constant(1024 * step))
        words = _transposed_words(arith.addi(base, offset))
        for (i, own), half in product(enumerate(words), range(2)):
            spread = arith.andi(arith.shli(own, shifts[half]), constant(0xC000C000))
            spread = arith.xori(spread, constant(0x40004000))
            flat[4 * step + i, half] = mgpu.utils.bitcast(spread, register_type)
    return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)


def store_transposed(out: Any, values: Any, dtype: Any) -> None:
    """Accumulators of :func:`transposed_codes` rows to shared memory, with k in order.

    Args:
        out: [T, 64] of ``dtype``; tiles [T / 8, 1, 8, 64] swizzled by 128 bytes.
        values: float32 [64, T] in ``WGMMA``.
        dtype: bfloat16 or float16.
    """
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    word = ir.IntegerType.get_signless(32)
    thread = mgpu.utils.thread_idx()
    quad, warp = masked(thread, 2, 7), masked(thread, 5, 3)
    base = llvm.ptrtoint(word, mgpu.utils.memref_ptr(out))
    base = arith.addi(base, arith.shli(warp, constant(2)))
    flat = values.registers.reshape(-1, 2)
    for one in range(2):
        row = arith.addi(arith.shli(masked(thread, 0, 3), constant(1)), constant(one))
        place = arith.shli(arith.xori(quad, row), constant(4))
        address = arith.addi(base, arith.addi(arith.shli(row, constant(7)), place))
        for tokens in range(len(flat)):
            pair = [vector.extract(flat[tokens, half], [], [one]) for half in range(2)]
            _store_pair(arith.addi(address, constant(1024 * tokens)), pair, dtype)


def _store_pair(address: Any, pair: Any, dtype: Any) -> None:
    """Two floats as four bytes."""
    import numpy as np
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    kind = "bf16x2" if np.dtype(dtype).name == "bfloat16" else "f16x2"
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [address, *pair],
        f"{{ .reg .b32 both; cvt.rn.{kind}.f32 both, $2, $1; st.shared.b32 [$0], both; }}",
        "r,f,f,~{memory}",
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


def masked(value: Any, shift: int, mask: int) -> Any:
    """Bits of a word from ``shift`` on."""
    from jaxlib.mlir.dialects import arith

    return arith.andi(arith.shrui(value, constant(shift)), constant(mask))
