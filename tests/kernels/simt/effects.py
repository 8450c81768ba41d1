"""Instructions of PTX that reach memory, or the other lanes of a warp."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.kernels.simt.arithmetic import LANES, Lanes, bytes_of, signed, unsigned
from tests.kernels.simt.ptx import Line, Names, parts

if TYPE_CHECKING:
    from tests.kernels.simt.machine import Warp


@dataclass
class Barrier:
    """Of shared memory, as ``mbarrier``."""

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0

    def arrive(self, arrivals: int, expected: int = 0, copied: int = 0) -> None:
        """Some threads or bytes; the phase is over when none are missing."""
        self.pending -= arrivals
        self.bytes += expected - copied
        assert self.pending >= 0, "more arrivals than the barrier was begun with"
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count


def _words_of(line: Line, word: str) -> list[str]:
    return parts(word) if word.startswith("{") else [word]


def _size(line: Line) -> int:
    return 2 if line.name.endswith("b16") else 4


def _load(warp: "Warp", line: Line, names: Names, active: Lanes) -> None:
    targets, size = _words_of(line, line.operands[0]), _size(line)
    at, memory = warp.address(line.operands[1], names), warp.space(line)
    assert (at[active] % (size * len(targets)) == 0).all(), "loads are aligned"
    for i, target in enumerate(targets):
        value = np.zeros(LANES, np.uint32)
        places = at[active] + size * i
        own = memory[places[:, None] + np.arange(size)]
        value[active] = own.copy().view(f"u{size}")[:, 0]
        warp.set(names, target, value, active)


def _store(warp: "Warp", line: Line, names: Names, active: Lanes) -> None:
    size, memory, machine = _size(line), warp.space(line), warp.machine
    at = warp.address(line.operands[0], names)
    for i, word in enumerate(_words_of(line, line.operands[1])):
        value = warp.value(word, names)[active].astype(f"u{size}")
        places = (at[active] + size * i)[:, None] + np.arange(size)

        def write(places: Any = places, value: Any = value) -> None:
            memory[places] = value[:, None].view(np.uint8)

        if ".relaxed" in line.name:
            # Other programs see it some time later.
            machine.later.append(write)
        else:
            write()
    machine.changes += 1


def _add(warp: "Warp", line: Line, names: Names, active: Lanes) -> None:
    at = warp.address(line.operands[0], names)[active]
    value = warp.value(line.operands[1], names)[active]
    words = warp.space(line).view(np.uint32)
    np.add.at(words, at // 4, value)
    warp.machine.changes += 1


def _shuffle(warp: "Warp", line: Line, names: Names, active: Lanes) -> None:
    assert active.all(), "shuffles need all lanes"
    target, source, distance = line.operands[:3]
    lane = warp.lanes ^ int(distance) if ".bfly" in line.name else np.full(LANES, int(distance))
    warp.set(names, target, warp.value(source, names)[lane], active)


def _reduce(warp: "Warp", line: Line, names: Names, active: Lanes) -> None:
    assert active.all(), "reductions need all lanes"
    value = names[line.operands[1]]
    found = value.max() if ".max" in line.name else value.sum(dtype=np.uint32)
    warp.set(names, line.operands[0], np.full(LANES, found, np.uint32), active)


def _multiply(warp: "Warp", line: Line, names: Names, active: Lanes) -> None:
    assert active.all(), "matrix units need all lanes"
    d, a, b, c = (parts(word) for word in line.operands)
    q, t = warp.lanes // 4, warp.lanes % 4
    k = 4 * t[:, None] + np.arange(4)
    rows, columns = np.zeros((16, 32), np.int64), np.zeros((32, 8), np.int64)
    for i, word in enumerate(a):
        rows[(q + 8 * (i % 2))[:, None], k + 16 * (i // 2)] = bytes_of(names[word])
    for i, word in enumerate(b):
        columns[k + 16 * i, q[:, None]] = bytes_of(names[word]).view(np.int8)
    sums = (rows @ columns).astype(np.int32)
    for i, (target, word) in enumerate(zip(d, c, strict=True)):
        own = sums[q + 8 * (i // 2), 2 * t + i % 2]
        warp.set(names, target, unsigned(signed(names[word]) + own), active)


def _begin_barrier(warp: "Warp", line: Line, names: Names, active: Lanes) -> None:
    (at,) = warp.address(line.operands[0], names)[active]
    count = int(line.operands[1])
    warp.program.barriers[int(at)] = Barrier(count, count)


def _barrier(warp: "Warp", word: str, names: Names, active: Lanes) -> Barrier:
    (at,) = set(warp.address(word, names)[active].tolist())
    return warp.program.barriers[at]


def _arrive(warp: "Warp", line: Line, names: Names, active: Lanes) -> None:
    expected = int(line.operands[2]) if ".expect_tx" in line.name else 0
    barrier = _barrier(warp, line.operands[1], names, active)
    barrier.arrive(int(active.sum()), expected=expected)
    warp.machine.changes += 1


def _try_wait(warp: "Warp", line: Line, names: Names, active: Lanes) -> None:
    barrier = _barrier(warp, line.operands[1], names, active)
    parity = names[line.operands[2]]
    warp.set(names, line.operands[0], np.not_equal(barrier.phase & 1, parity), active)


def _copy(warp: "Warp", line: Line, names: Names, active: Lanes) -> None:
    into, source, size, _ = line.operands
    barrier = _barrier(warp, line.operands[3], names, active)
    shared, memory, count = warp.program.shared, warp.machine.memory, int(size)
    targets, sources = (warp.address(word, names)[active] for word in (into, source))
    for to, start in zip(targets, sources, strict=True):
        assert not any(x % 16 for x in (to, start, count)), "copies are of 16 bytes"

        def arrive(to: int = to, start: int = start) -> None:
            shared[to : to + count] = memory[start : start + count]
            barrier.arrive(0, copied=count)

        warp.machine.later.append(arrive)
    warp.machine.changes += 1


def _nothing(warp: "Warp", line: Line, names: Names, active: Lanes) -> None:
    del warp, line, names, active


def _split(warp: "Warp", line: Line, names: Names, active: Lanes) -> None:
    """``mov.b32`` to or from two halves."""
    target, source = line.operands
    value = warp.value(source, names)
    if target.startswith("{"):
        for i, word in enumerate(parts(target)):
            warp.set(names, word, (value >> (16 * i)) & 0xFFFF, active)
    else:
        warp.set(names, target, value, active)


EFFECTS: dict[str, Callable[["Warp", Line, Names, Lanes], None]] = {
    "mov.b32": _split,
    "ld.shared.b32": _load,
    "ld.shared.v2.b32": _load,
    "ld.shared.v4.b32": _load,
    "ld.global.nc.b32": _load,
    "ld.global.nc.v4.b32": _load,
    "ld.relaxed.gpu.global.b32": _load,
    "ld.relaxed.gpu.global.v4.b32": _load,
    "st.shared.b32": _store,
    "st.shared.b16": _store,
    "st.shared.v4.b32": _store,
    "st.global.b16": _store,
    "st.relaxed.gpu.global.b32": _store,
    "red.shared.add.s32": _add,
    "red.relaxed.gpu.global.add.u32": _add,
    "shfl.sync.bfly.b32": _shuffle,
    "shfl.sync.idx.b32": _shuffle,
    "redux.sync.max.u32": _reduce,
    "redux.sync.add.s32": _reduce,
    "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32": _multiply,
    "mbarrier.init.shared.b64": _begin_barrier,
    "mbarrier.arrive.shared.b64": _arrive,
    "mbarrier.arrive.expect_tx.shared.b64": _arrive,
    "mbarrier.try_wait.parity.shared.b64": _try_wait,
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes": _copy,
    "cp.async.bulk.prefetch.L2.global": _nothing,
    "fence.mbarrier_init.release.cluster": _nothing,
    "fence.proxy.async.shared::cta": _nothing,
    "bar.warp.sync": _nothing,
    "setmaxnreg.inc.sync.aligned.u32": _nothing,
    "setmaxnreg.dec.sync.aligned.u32": _nothing,
}
