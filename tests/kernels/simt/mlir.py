"""MLIR of a kernel as a warp carries it out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.kernels.simt.arithmetic import LANES


@dataclass(frozen=True)
class Operation:
    """An operation of MLIR as it is carried out.

    Attributes:
        name: of it.
        operands: keys of values.
        results: likewise.
        attribute: a constant, a predicate, a position, a dtype; whether a result is a structure.
        blocks: operations of its regions.
        arguments: keys of the arguments of the first.
        text: of inline PTX.
        kinds: of its results, a letter each.
    """

    name: str
    operands: list[int]
    results: list[int]
    attribute: Any = None
    blocks: Sequence[Any] = ()
    arguments: Sequence[int] = ()
    text: str = ""
    kinds: str = ""


def operations_of(block: Any) -> list[Operation]:
    """A block of MLIR."""
    return [_operation(one) for one in block.operations]


def _operation(op: Any) -> Operation:
    op = op.operation
    blocks = [block for region in op.regions for block in region.blocks]
    text, kinds, attribute = "", "", None
    if op.name == "llvm.inline_asm":
        text = op.attributes["asm_string"].value
        constraints = op.attributes["constraints"].value.split(",")
        kinds = "".join(c.strip("=&") for c in constraints if c.startswith("="))
        attribute = bool(op.results) and "struct" in str(op.results[0].type)
    elif op.name == "arith.constant":
        value, kind = op.attributes["value"].value, str(op.results[0].type)
        if kind == "f32":
            attribute = np.full(LANES, value, np.float32)
        else:
            bits = int(kind[1:])
            attribute = np.full(LANES, value % (1 << bits), f"u{bits // 8}")
    elif op.name == "arith.cmpi":
        attribute = op.attributes["predicate"].value
    elif op.name == "arith.bitcast":
        attribute = {"f32": np.float32, "i32": np.uint32}[str(op.results[0].type)]
    elif op.name == "llvm.extractvalue":
        attribute = op.attributes["position"][0]
    return Operation(
        name=op.name,
        operands=[_key(value) for value in op.operands],
        results=[_key(value) for value in op.results],
        attribute=attribute,
        blocks=[operations_of(block) for block in blocks],
        arguments=[_key(value) for value in blocks[0].arguments] if blocks else (),
        text=text,
        kinds=kinds,
    )


_KEYS: dict[Any, int] = {}


def _key(value: Any) -> int:
    return _KEYS.setdefault(value, len(_KEYS))
