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
    return arith.constant(word, ir.IntegerAttr.get(word, value))
