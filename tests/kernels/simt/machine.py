"""Runs a Mosaic GPU kernel that is written thread by thread, without a GPU.

The kernel's MLIR is carried out warp by warp, 32 lanes at a time, and its inline PTX instruction by
instruction, as the PTX ISA defines them (sections 9.7.1 to 9.7.15). What the hardware may do in any
order is done in a random one: which warp goes on after one that waits, when bytes that are copied
in the background arrive, when a relaxed store is seen by others. What collective instructions need,
all lanes together, is asserted, and a launch in which every warp waits for ever is an error.
"""

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.kernels.simt.arithmetic import ARITHMETIC, LANES, OPERATIONS, Lanes
from tests.kernels.simt.effects import EFFECTS, Barrier
from tests.kernels.simt.ptx import Line, Names, parsed, parts

Step = Generator[None]
PATIENCE = 3
"""Rounds in which nothing but waiting happens before a launch counts as stuck."""


@dataclass
class Program:
    """A block: its shared memory and its barriers."""

    number: int
    shared: np.ndarray
    barriers: dict[int, Barrier] = field(default_factory=dict)
    arrived: Counter[str] = field(default_factory=Counter)


class Machine:
    """Global memory, and what is on its way.

    Args:
        memory: bytes; addresses of the kernel are places in it.
        seed: of every order.
    """

    def __init__(self, memory: np.ndarray, seed: int) -> None:
        self.memory = memory
        self.random = np.random.default_rng(seed)
        self.later: list[Callable[[], None]] = []
        self.changes = 0

    def run(self, operations: Any, programs: int, threads: int, shared_bytes: int) -> None:
        """All programs of a launch, to their end."""
        blocks = [Program(i, np.zeros(shared_bytes, np.uint8)) for i in range(programs)]
        warps = [
            Warp(self, block, number).run(operations)
            for block in blocks
            for number in range(threads // LANES)
        ]
        # What a warp waits for comes with a change.
        seen = [-1] * len(warps)
        waited = 0
        while warps:
            before = self.changes
            ended: list[int] = []
            for i in self.random.permutation(len(warps)):
                if seen[i] == self.changes:
                    continue
                seen[i] = self.changes
                try:
                    next(warps[i])
                except StopIteration:
                    self.changes += 1
                    ended.append(i)
            for i in sorted(ended, reverse=True):
                del warps[i], seen[i]
            self._happen()
            waited = 0 if self.changes > before or self.later else waited + 1
            assert waited < PATIENCE, f"{len(warps)} warps wait for ever"
        while self.later:
            self._happen()

    def _happen(self) -> None:
        """Some of what is on its way arrives, in any order."""
        for _ in range(int(self.random.integers(len(self.later) + 1)) if self.later else 0):
            i = int(self.random.integers(len(self.later)))
            self.later.pop(i)()
            self.changes += 1


class Warp:
    """One warp."""

    def __init__(self, machine: Machine, program: Program, number: int) -> None:
        self.machine, self.program = machine, program
        self.lanes = np.arange(LANES, dtype=np.uint32)
        self.thread = self.lanes + np.uint32(LANES * number)
        self.values: dict[Any, Any] = {}
        self.every = np.ones(LANES, bool)

    # ---- MLIR ------------------------------------------------------------------------------------

    def run(self, operations: Any, mask: Lanes | None = None) -> Generator[None, None, list[Any]]:
        """A block of operations; what it yields at its end."""
        mask = self.every if mask is None else mask
        for operation in operations:
            name = operation.name
            if name == "scf.yield" or name == "func.return":
                return [self.values[v] for v in operation.operands]
            if name == "scf.for":
                yield from self._for(operation, mask)
            elif name == "scf.if":
                yield from self._if(operation, mask)
            elif name == "llvm.inline_asm":
                yield from self._assembly(operation, mask)
            else:
                values = [self.values[v] for v in operation.operands]
                self.values[operation.results[0]] = OPERATIONS[name](operation, *values)
        return []

    def _for(self, operation: Any, mask: Lanes) -> Step:
        first, last, step, *carried = [self.values[v] for v in operation.operands]
        index, arguments = first.copy(), operation.arguments
        while True:
            active = mask & (index.view(np.int32) < last.view(np.int32))
            if not active.any():
                break
            for argument, value in zip(arguments, [index, *carried], strict=True):
                self.values[argument] = value
            new = yield from self.run(operation.blocks[0], active)
            carried = [np.where(active, b, a) for a, b in zip(carried, new, strict=True)]
            index = index + step
        for result, value in zip(operation.results, carried, strict=True):
            self.values[result] = value

    def _if(self, operation: Any, mask: Lanes) -> Step:
        condition = self.values[operation.operands[0]]
        found: list[Any] = [None] * len(operation.results)
        for block, wanted in zip(operation.blocks, (condition, ~condition), strict=False):
            active = mask & wanted
            if active.any():
                new = yield from self.run(block, active)
                found = [
                    b if a is None else np.where(active, b, a)
                    for a, b in zip(found, new, strict=True)
                ]
        for result, value in zip(operation.results, found, strict=True):
            self.values[result] = value

    # ---- PTX -------------------------------------------------------------------------------------

    def _assembly(self, operation: Any, mask: Lanes) -> Step:
        kinds = operation.kinds
        inputs = [self.values[v] for v in operation.operands]
        names: Names = {
            f"${len(kinds) + i}": x.view(np.uint32) if x.dtype == np.float32 else x
            for i, x in enumerate(inputs)
        }
        lines, labels = parsed(operation.text)
        at, active = 0, mask
        while at < len(lines):
            line, at = lines[at], at + 1
            own = active
            if line.predicate is not None:
                own = active & (names[line.predicate] ^ line.negated)
            if line.name == "bra":
                assert at == len(lines), "nothing follows a loop"
                if own.any():
                    # The others are done and keep what they have.
                    active, at = own, labels[line.operands[0]]
                    yield
            elif line.name == "barrier.sync.aligned":
                assert own.all(), "a barrier needs all lanes"
                yield from self._meet(line.operands)
            elif own.any():
                self._instruction(line, names, own)
        values = [
            names[f"${i}"].view(np.float32) if kind == "f" else names[f"${i}"]
            for i, kind in enumerate(kinds)
        ]
        if values:
            self.values[operation.results[0]] = values if operation.attribute else values[0]

    def _meet(self, operands: Sequence[str]) -> Step:
        number, threads = operands[0], int(operands[1])
        arrived = self.program.arrived
        turn = arrived[number] * LANES // threads
        arrived[number] += 1
        self.machine.changes += 1
        while arrived[number] * LANES // threads == turn:
            yield

    def _instruction(self, line: "Line", names: Names, active: Lanes) -> None:
        effect = EFFECTS.get(line.name)
        if effect is not None:
            effect(self, line, names, active)
            return
        call = ARITHMETIC[line.name]
        values = [self.value(word, names) for word in line.operands[1:]]
        with np.errstate(all="ignore"):
            self.set(names, line.operands[0], call(*values), active)

    def value(self, word: str, names: Names) -> Lanes:
        if word in names:
            return names[word]
        if word.startswith("{"):
            low, high = (self.value(part, names) for part in parts(word))
            return low & 0xFFFF | (high << 16)
        if word.startswith("%"):
            return {
                "%tid.x": self.thread,
                "%ctaid.x": np.full(LANES, self.program.number, np.uint32),
            }[word]
        bits = int(word[2:], 16) if word.startswith("0f") else int(word, 0)
        return np.full(LANES, bits & 0xFFFFFFFF, np.uint32)

    def set(self, names: Names, word: str, value: Lanes, active: Lanes) -> None:
        old = names.get(word)
        value = value.view(np.uint32) if value.dtype == np.float32 else value
        names[word] = value if old is None else np.where(active, value, old)

    # ---- memory ----------------------------------------------------------------------------------

    def address(self, word: str, names: Names) -> Lanes:
        """Of ``[register]`` or ``[register + offset]``."""
        register, _, offset = word.strip("[]").partition("+")
        return names[register.strip()].astype(np.int64) + int(offset or 0)

    def space(self, line: "Line") -> np.ndarray:
        """The memory of an instruction."""
        return self.program.shared if ".shared" in line.name else self.machine.memory
