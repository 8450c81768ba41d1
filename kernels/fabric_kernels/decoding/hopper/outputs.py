"""What becomes of the sums of products: values that other programs receive."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fabric_kernels.decoding.hopper import control, memory
from fabric_kernels.decoding.hopper.plan import THREADS, UNIT_ROWS
from fabric_kernels.decoding.hopper.program import Program
from fabric_kernels.decoding.hopper.values import Address, Float, Word, select
from fabric_kernels.norm import Gate

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Outputs:
    """Sums to values that other programs receive, an output a thread at a time.

    Attributes:
        program: it.
        name: of the phase.
        layer: the layer.
        scales: of its matrices.
        start: the first unit.
        count: how many units.
    """

    program: Program
    name: str
    layer: Word
    scales: Sequence[Float]
    start: Word
    count: Word

    @property
    def each(self) -> int:
        """Outputs of a unit."""
        return UNIT_ROWS * self.program.plan.rows

    def _entries(self) -> list[tuple[Any, Word]]:
        """Those of this thread: whether there is one, and its number."""
        plan = self.program.plan
        phase = plan.phases[self.name]
        most = phase.most_tiles(plan.programs) // phase.each * self.each
        entries = [self.program.thread + first for first in range(0, most, THREADS)]
        return [(entry.below(self.count * self.each), entry) for entry in entries]

    def _place(self, entry: Word) -> tuple[Word, Word, Word, Word]:
        """Unit of this program, token, row of the unit, and number among all outputs."""
        unit, rest = entry // self.each, entry % self.each
        token, row = rest >> 4, rest & 15
        number = (self.start + unit * self.program.plan.programs) * UNIT_ROWS + row
        return unit, token, row, number

    def before(self) -> list[Float]:
        """What products are added to, which has been there for long."""
        if self.name not in ("close", "narrow"):
            return []
        tag = self.program.tag("h", self.layer, after="close" if self.name == "narrow" else "")
        wanted: list[tuple[Any, Address]] = []
        for there, entry in self._entries():
            _, token, _, number = self._place(entry)
            wanted.append((there, self.program.vector("h", token, number)))
        return memory.receive(wanted, tag)

    def finish(self, before: Sequence[Float]) -> None:
        """Sends all of them; the sums are zeros again."""
        for i, (there, entry) in enumerate(self._entries()):
            control.when(there, partial(self._send, entry, before[i] if before else None))

    def _send(self, entry: Word, before: Float | None) -> None:
        program, layer = self.program, self.layer
        unit, token, row, number = self._place(entry)
        statistics = memory.load_shared_2(program.statistics(token))
        found = partial(self._value, (unit, token, row), statistics)
        if self.name == "widen":
            y = _gated(found(0, self.scales[0]), found(1, self.scales[1]), program.activation)
            memory.send(program.vector("middle", token, number), y, program.tag("middle", layer))
        elif before is None:
            # q, k and v follow one another in what is exchanged too.
            scale, end = self.scales[0], 0
            rows = program.plan.phases[self.name].rows
            for own, other in zip(rows[:-1], self.scales[1:], strict=True):
                end += own
                scale = select(number.below(end), scale, other)
            memory.send(
                program.vector("q", token, number), found(0, scale), program.tag("q", layer)
            )
        else:
            y = before + found(0, self.scales[0])
            tag = program.tag("h", layer, after=self.name)
            memory.send(program.vector("h", token, number), y, tag)

    def _value(
        self,
        place: tuple[Word, Word, Word],
        statistics: Sequence[Word],
        part: int,
        scale: Float,
    ) -> Float:
        plan, (unit, token, row) = self.program.plan, place
        tile = unit * plan.phases[self.name].each + part
        at = self.program.place("sums") + ((tile * plan.rows + token) * UNIT_ROWS + row) * 4
        found = memory.load_shared(at) - statistics[0]
        memory.store_shared(at, Word(0))
        factor = statistics[1].bits_as_float().reciprocal()
        return (found.as_float() * (factor * scale)).in_bfloat16()


def _gated(gate: Float, up: Float, activation: Gate) -> Float:
    """Steps rounded as ``gated_product``'s."""
    if activation == "silu":
        decay = (gate * -LOG2_E).power_of_two()
        sigmoid = (decay + 1.0).reciprocal().in_bfloat16()
        return (gate * sigmoid).in_bfloat16() * up
    positive = gate.most(0.0)
    return (positive * positive).in_bfloat16() * up
