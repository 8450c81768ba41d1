"""Branches and loops of a thread, and what the threads of a program do together."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import scf

from fabric_kernels.decoding.hopper.values import Word, as_word, ptx


def register(name: str) -> Word:
    """A special register, as ``tid.x``."""
    return ptx(f"mov.u32 $0, %{name};", "r")


def when(condition: Any, body: Callable[[], None]) -> None:
    """Does something if."""
    branch: Any = scf.IfOp(condition)
    with ir.InsertionPoint(branch.then_block):
        body()
        scf.yield_([])


def either(condition: Any, yes: Callable[[], None], no: Callable[[], None]) -> None:
    """Does one of two things."""
    branch: Any = scf.IfOp(condition, has_else=True)
    for block, body in ((branch.then_block, yes), (branch.else_block, no)):
        with ir.InsertionPoint(block):
            body()
            scf.yield_([])


def changed_if(
    condition: Any, values: Sequence[Any], body: Callable[..., Sequence[Any]]
) -> list[Any]:
    """What ``body`` makes of some values if, or the values themselves."""
    branch: Any = scf.IfOp(condition, [one.value.type for one in values], has_else=True)
    with ir.InsertionPoint(branch.then_block):
        scf.yield_([one.value for one in body(*values)])
    with ir.InsertionPoint(branch.else_block):
        scf.yield_([one.value for one in values])
    return [type(one)(new) for one, new in zip(values, branch.results, strict=True)]


def loop(count: Word | int, values: Sequence[Any], body: Callable[..., Sequence[Any]]) -> list[Any]:
    """``values = body(i, *values)`` for i below ``count``."""
    repeat = scf.ForOp(
        Word(0).value, as_word(count).value, Word(1).value, [one.value for one in values]
    )
    with ir.InsertionPoint(repeat.body):
        own = [type(one)(v) for one, v in zip(values, repeat.inner_iter_args, strict=True)]
        new = body(Word(repeat.induction_variable), *own)
        scf.yield_([one.value for one in new])
    return [type(one)(v) for one, v in zip(values, repeat.results, strict=True)]


def exchange(value: Any, distance: int) -> Any:
    """What the lane at this distance has, in each bit of the lane's number."""
    kind = "r" if isinstance(value, Word) else "f"
    text = f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, -1;"
    return ptx(text, kind, value, effects=True)


def first_of_warp(value: Word) -> Word:
    """What the first lane has, so that the compiler knows it is the same in all of them."""
    return ptx("shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "r", value, effects=True)


def most_of_warp(value: Word) -> Word:
    """The largest of the lanes' words, as unsigned numbers."""
    return ptx("redux.sync.max.u32 $0, $1, -1;", "r", value, effects=True)


def sum_of_warp(value: Word) -> Word:
    """Of the lanes' words."""
    return ptx("redux.sync.add.s32 $0, $1, -1;", "r", value, effects=True)


def more_registers(count: int) -> None:
    """What a thread may have from here on; by all warps of a warpgroup."""
    ptx(f"setmaxnreg.inc.sync.aligned.u32 {count};", "", effects=True)


def fewer_registers(count: int) -> None:
    """As ``more_registers``, so that others may have more."""
    ptx(f"setmaxnreg.dec.sync.aligned.u32 {count};", "", effects=True)


def meet(number: int, threads: int) -> None:
    """A barrier of some threads of a program, one of sixteen."""
    ptx(f"barrier.sync.aligned {number}, {threads};", "", effects=True)


def meet_warp() -> None:
    """A barrier of a warp."""
    ptx("bar.warp.sync -1;", "", effects=True)
