"""Values of one thread of a Mosaic GPU kernel, at the level of the compiler.

Thin ones around those of MLIR: 32-bit words, floats and addresses, with the instructions of PTX
that have no operation in Pallas.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm


def _word_type() -> Any:
    return ir.IntegerType.get_signless(32)


def _long_type() -> Any:
    return ir.IntegerType.get_signless(64)


def _constant(value: int, kind: Any) -> Any:
    bits = kind.width
    return arith.constant(kind, ir.IntegerAttr.get(kind, value - (value >> (bits - 1) << bits)))


ROUNDER = "0f4B400000"
"""1.5 · 2^23: added to a float, it leaves the nearest integer in the lowest bits."""


class Word:
    """A 32-bit integer: ``>>`` shifts zeros in, comparisons are signed."""

    def __init__(self, value: Any) -> None:
        """Wraps an MLIR value, or makes a constant of an int."""
        self.value = _constant(value, _word_type()) if isinstance(value, int) else value

    def _with(self, operation: Callable[..., Any], other: "Word | int") -> "Word":
        return Word(operation(self.value, as_word(other).value))

    def __add__(self, other: "Word | int") -> "Word":
        return self._with(arith.addi, other)

    def __sub__(self, other: "Word | int") -> "Word":
        return self._with(arith.subi, other)

    def __mul__(self, other: "Word | int") -> "Word":
        return self._with(arith.muli, other)

    def __and__(self, other: "Word | int") -> "Word":
        return self._with(arith.andi, other)

    def __or__(self, other: "Word | int") -> "Word":
        return self._with(arith.ori, other)

    def __xor__(self, other: "Word | int") -> "Word":
        return self._with(arith.xori, other)

    def __lshift__(self, other: "Word | int") -> "Word":
        return self._with(arith.shli, other)

    def __rshift__(self, other: "Word | int") -> "Word":
        return self._with(arith.shrui, other)

    def __floordiv__(self, other: "Word | int") -> "Word":
        return self._with(arith.divui, other)

    def __mod__(self, other: "Word | int") -> "Word":
        return self._with(arith.remui, other)

    def shifted(self, bits: int) -> "Word":
        """To the right, the sign kept."""
        return self._with(arith.shrsi, bits)

    def most_unsigned(self, other: "Word") -> "Word":
        """The larger of both, of no sign."""
        return ptx("max.u32 $0, $1, $2;", "r", self, other)

    def least(self, other: "Word | int") -> "Word":
        """The smaller of both."""
        return ptx("min.s32 $0, $1, $2;", "r", self, as_word(other))

    def _compare(self, how: Any, other: "Word | int") -> Any:
        return arith.cmpi(how, self.value, as_word(other).value)

    def below(self, other: "Word | int") -> Any:
        """A condition."""
        return self._compare(arith.CmpIPredicate.slt, other)

    def equals(self, other: "Word | int") -> Any:
        """A condition."""
        return self._compare(arith.CmpIPredicate.eq, other)

    def as_float(self) -> "Float":
        """The nearest float32 of a signed integer."""
        return Float(arith.sitofp(ir.F32Type.get(), self.value))

    def bits_as_float(self) -> "Float":
        """The float32 of these bits."""
        return Float(arith.bitcast(ir.F32Type.get(), self.value))


class Float:
    """A float32."""

    def __init__(self, value: Any) -> None:
        """Wraps an MLIR value, or makes a constant of a number."""
        if isinstance(value, float | int):
            kind = ir.F32Type.get()
            value = arith.constant(kind, ir.FloatAttr.get(kind, float(value)))
        self.value = value

    def __add__(self, other: "Float | float") -> "Float":
        return Float(arith.addf(self.value, as_float(other).value))

    def __sub__(self, other: "Float | float") -> "Float":
        return Float(arith.subf(self.value, as_float(other).value))

    def __mul__(self, other: "Float | float") -> "Float":
        """Rounded by itself: nothing joins it with an addition."""
        return ptx("mul.rn.f32 $0, $1, $2;", "f", self, as_float(other))

    def times_plus(self, by: "Float", plus: "Float") -> "Float":
        """``self · by + plus``, rounded once."""
        return ptx("fma.rn.f32 $0, $1, $2, $3;", "f", self, by, plus)

    def over(self, other: "Float | float") -> "Float":
        """The quotient, correctly rounded."""
        return ptx("div.rn.f32 $0, $1, $2;", "f", self, as_float(other))

    def most(self, other: "Float | float") -> "Float":
        """The larger of both."""
        return ptx("max.f32 $0, $1, $2;", "f", self, as_float(other))

    def reciprocal(self) -> "Float":
        """Correctly rounded."""
        return ptx("rcp.rn.f32 $0, $1;", "f", self)

    def inverse_root(self) -> "Float":
        """As XLA computes it."""
        return ptx("rsqrt.approx.f32 $0, $1;", "f", self)

    def power_of_two(self) -> "Float":
        """2 to this."""
        return ptx("ex2.approx.ftz.f32 $0, $1;", "f", self)

    def nearest_byte(self) -> Word:
        """A word whose lowest byte is the nearest integer, half to even, of -128 to 127."""
        return ptx(f"add.rn.f32 $0, $1, {ROUNDER};", "f", self).bits()

    def in_bfloat16(self) -> "Float":
        """Rounded to bfloat16."""
        return ptx(
            "{ .reg .b16 h, z; mov.b16 z, 0; cvt.rn.bf16.f32 h, $1; mov.b32 $0, {z, h}; }",
            "f",
            self,
        )

    def bits(self) -> Word:
        """Its bits."""
        return Word(arith.bitcast(_word_type(), self.value))

    def magnitude(self) -> Word:
        """The bits of its absolute value, which are ordered as integers are."""
        return self.bits() & 0x7FFFFFFF


def as_word(value: Word | int) -> Word:
    """A word, or one of an int."""
    return value if isinstance(value, Word) else Word(value)


def as_float(value: Float | float) -> Float:
    """A float, or one of a number."""
    return value if isinstance(value, Float) else Float(value)


class Address:
    """Of global memory, 64 bits."""

    def __init__(self, value: Any) -> None:
        """Wraps an MLIR value of 64 bits."""
        self.value = value

    @classmethod
    def at(cls, place: int) -> "Address":
        """A place that is known."""
        return cls(_constant(place, _long_type()))

    @classmethod
    def of(cls, array: Any) -> "Address":
        """The first byte of a memref."""
        return cls(llvm.ptrtoint(_long_type(), mgpu.utils.memref_ptr(array)))

    def plus(self, index: Word | int, stride: int = 1) -> "Address":
        """So many times ``stride`` bytes further; an index is not negative."""
        long = arith.extui(_long_type(), as_word(index).value)
        return Address(arith.addi(self.value, arith.muli(long, _constant(stride, _long_type()))))


def shared_base(array: Any) -> Word:
    """The place in shared memory of a memref's first byte."""
    return Word(llvm.ptrtoint(_word_type(), mgpu.utils.memref_ptr(array)))


KINDS = {"r": Word, "f": Float}
LETTERS = {Word: "r", Float: "f", Address: "l"}


def ptx(text: str, results: str, *arguments: Any, effects: bool = False) -> Any:
    """Inline PTX: ``$0`` and so on are the results, then the arguments.

    Args:
        text: instructions.
        results: a letter each: r for a word, f for a float.
        arguments: values of this module, or conditions.
        effects: whether it must be where it is, and be there at all.
    """
    types = [_word_type() if kind == "r" else ir.F32Type.get() for kind in results]
    constraints = [f"={kind}" for kind in results]
    values: list[Any] = []
    for argument in arguments:
        known = type(argument) in LETTERS
        constraints.append(LETTERS[type(argument)] if known else "b")
        values.append(argument.value if known else argument)
    returned = ir.Type.parse("!llvm.void")
    if types:
        returned = types[0] if len(types) == 1 else llvm.StructType.get_literal(types)
    found: Any = llvm.inline_asm(
        returned, values, text, ",".join(constraints), has_side_effects=effects
    )
    if len(types) <= 1:
        return KINDS[results](found) if types else None
    return [
        KINDS[kind](llvm.extractvalue(type_, found, [i]))
        for i, (kind, type_) in enumerate(zip(results, types, strict=True))
    ]


def ptx_early(results: str, text: str, *arguments: Any) -> list[Any]:
    """Inline PTX that writes results before it has read all arguments."""
    values = [getattr(one, "value", one) if type(one) in LETTERS else one for one in arguments]
    types = [_word_type()] * len(results)
    constraints = [f"=&{kind}" for kind in results]
    constraints += [LETTERS.get(type(one), "b") for one in arguments]
    found: Any = llvm.inline_asm(
        llvm.StructType.get_literal(types),
        values,
        text,
        ",".join(constraints),
        has_side_effects=True,
    )
    return [Word(llvm.extractvalue(_word_type(), found, [i])) for i in range(len(types))]


def both(first: Any, second: Any) -> Any:
    """A condition."""
    return arith.andi(first, second)


def select(condition: Any, yes: Any, no: Any) -> Any:
    """One of two values of a kind."""
    return type(yes)(arith.select(condition, yes.value, no.value))


def tree(values: Sequence[Any], operation: Callable[[Any, Any], Any]) -> Any:
    """Neighbours together, and so on, until one is left."""
    found = list(values)
    while len(found) > 1:
        odd = found[len(found) // 2 * 2 :]
        found = [operation(a, b) for a, b in zip(found[::2], found[1::2], strict=False)] + odd
    return found[0]


def low_bytes(first: Word, second: Word) -> Word:
    """The lowest byte of the first, and then that of the second; what is above is anything."""
    return ptx("prmt.b32 $0, $1, $2, 0x0040;", "r", first, second)


def add_two_bytes(total: Word, pair: Word) -> Word:
    """A sum with the two lowest bytes of a word added, signed."""
    return ptx("dp4a.s32.s32 $0, $1, 257, $2;", "r", pair, total)


def most_halves(first: Word, second: Word) -> Word:
    """The larger of each half, bfloat16; what is not a number stays."""
    return ptx("max.NaN.bf16x2 $0, $1, $2;", "r", first, second)


def unpack_halves(words: Sequence[Word]) -> list[Float]:
    """Two bfloat16 a word."""
    return [half.bits_as_float() for word in words for half in (word << 16, word & 0xFFFF0000)]


def pack_halves(values: Sequence[Float]) -> list[Word]:
    """Two bfloat16 a word."""
    return [
        ptx("cvt.rn.bf16x2.f32 $0, $1, $2;", "r", values[i + 1], values[i])
        for i in range(0, len(values), 2)
    ]


def multiply(sums: Sequence[Word], rows: Sequence[Word], columns: Sequence[Word]) -> list[Word]:
    """``sums + rows · columns`` of a warp: 16 rows by 8 columns, over 32 k.

    The fragments of ``mma.m16n8k32`` (PTX ISA, "Matrix fragments for mma.m16n8k32"). Lane 4 q + t
    has:

    Args:
        sums: four words, int32: row q, columns 2t and 2t + 1, and likewise of row q + 8.
        rows: four words of four unsigned bytes, k from 4t on: of row q, of row q + 8, and of both
            16 k further.
        columns: two words of four signed bytes, k from 4t on: of column q, and 16 k further.
    """
    text = (
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32"
        " {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    return ptx(text, "rrrr", *rows, *columns, *sums, effects=True)
