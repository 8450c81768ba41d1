"""Arithmetic of a warp: instructions of PTX, and operations of MLIR."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

LANES = 32
Lanes = np.ndarray
"""A register of a warp, [32]."""


def _f(x: Lanes) -> Lanes:
    return x.view(np.float32)


def signed(x: Lanes) -> Lanes:
    return x.view(np.int32)


def unsigned(x: Lanes) -> Lanes:
    return np.ascontiguousarray(x).view(np.uint32)


def _wide(call: Callable[..., Any]) -> Callable[..., Lanes]:
    """Floats, computed in float64 and rounded once."""
    return lambda *x: unsigned(np.asarray(call(*(_f(a).astype(np.float64) for a in x)), np.float32))


def bytes_of(x: Lanes) -> Lanes:
    return np.ascontiguousarray(x, np.uint32)[:, None].view(np.uint8)


def _permute(a: Lanes, b: Lanes, selector: Lanes) -> Lanes:
    every = np.concatenate([bytes_of(a), bytes_of(b)], axis=1)
    chosen = np.stack([(selector >> (4 * i)) & 7 for i in range(4)], axis=1)
    return np.take_along_axis(every, chosen.astype(np.int64), axis=1).copy().view(np.uint32)[:, 0]


def _dot(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    products = bytes_of(a).view(np.int8).astype(np.int32) * bytes_of(b).view(np.int8)
    return unsigned(signed(c) + products.sum(1, dtype=np.int32))


def _bfloat16(x: Lanes) -> Lanes:
    """Its 16 bits."""
    return _f(x).astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint32)


def _most_halves(a: Lanes, b: Lanes) -> Lanes:
    halves = [
        (np.ascontiguousarray(x)[:, None].view(ml_dtypes.bfloat16)).astype(np.float32)
        for x in (a, b)
    ]
    found = np.maximum(*halves).astype(ml_dtypes.bfloat16)
    return found.view(np.uint32)[:, 0]


ARITHMETIC: dict[str, Callable[..., Lanes]] = {
    "mov.b32": lambda a: a,
    "mov.b16": lambda a: a,
    "mov.u32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "lop3.b32": lambda a, b, c, table: {0xF6: a | (b ^ c)}[int(table[0])],
    "prmt.b32": _permute,
    "dp4a.s32.s32": _dot,
    "max.u32": np.maximum,
    "min.s32": lambda a, b: unsigned(np.minimum(signed(a), signed(b))),
    "max.NaN.bf16x2": _most_halves,
    "mul.rn.f32": lambda a, b: unsigned(_f(a) * _f(b)),
    "add.rn.f32": lambda a, b: unsigned(_f(a) + _f(b)),
    "max.f32": lambda a, b: unsigned(np.fmax(_f(a), _f(b))),
    "fma.rn.f32": _wide(lambda a, b, c: a * b + c),
    "div.rn.f32": _wide(lambda a, b: a / b),
    "rcp.rn.f32": _wide(lambda a: 1 / a),
    "rsqrt.approx.f32": _wide(lambda a: 1 / np.sqrt(a)),
    "ex2.approx.ftz.f32": _wide(np.exp2),
    "cvt.rn.bf16.f32": _bfloat16,
    "cvt.rn.bf16x2.f32": lambda high, low: _bfloat16(low) | (_bfloat16(high) << 16),
    "setp.ne.b32": lambda a, b: a != b,
    "setp.lt.s32": lambda a, b: signed(a) < signed(b),
}


def _compare(operation: Any, a: Lanes, b: Lanes) -> Lanes:
    # Predicates of arith.cmpi: eq, ne, slt, sle, sgt, sge.
    calls = {0: np.equal, 2: np.less, 3: np.less_equal, 4: np.greater, 5: np.greater_equal}
    return calls[operation.attribute](signed(a), signed(b))


def _integers(call: Callable[[Any, Any], Any]) -> Callable[..., Lanes]:
    def run(_: Any, a: Lanes, b: Lanes) -> Lanes:
        with np.errstate(all="ignore"):
            return call(a, b).astype(a.dtype)

    return run


OPERATIONS: dict[str, Callable[..., Any]] = {
    "arith.constant": lambda operation: operation.attribute,
    "arith.addi": _integers(np.add),
    "arith.subi": _integers(np.subtract),
    "arith.muli": _integers(np.multiply),
    "arith.andi": _integers(np.bitwise_and),
    "arith.ori": _integers(np.bitwise_or),
    "arith.xori": _integers(np.bitwise_xor),
    "arith.shli": _integers(np.left_shift),
    "arith.shrui": _integers(np.right_shift),
    "arith.divui": _integers(np.floor_divide),
    "arith.remui": _integers(np.remainder),
    "arith.shrsi": lambda _, a, b: unsigned(signed(a) >> signed(b)),
    "arith.cmpi": _compare,
    "arith.select": lambda _, c, a, b: np.where(c, a, b),
    "arith.extui": lambda _, a: a.astype(np.uint64),
    "arith.sitofp": lambda _, a: signed(a).astype(np.float32),
    "arith.bitcast": lambda operation, a: a.view(operation.attribute),
    "arith.addf": _integers(np.add),
    "arith.subf": _integers(np.subtract),
    "llvm.extractvalue": lambda operation, a: a[operation.attribute],
}
