"""What the threads of a program of the Mosaic GPU decoding kernel know."""

from collections.abc import Mapping
from dataclasses import dataclass

from fabric_kernels.decoding.hopper import control, memory
from fabric_kernels.decoding.hopper.plan import (
    COUNTER_WORDS,
    PHASES,
    TEAM,
    TEAMS,
    THREADS,
    Phase,
    Plan,
)
from fabric_kernels.decoding.hopper.values import Address, Word, select
from fabric_kernels.norm import Gate


@dataclass(frozen=True)
class Slot:
    """Of a ring of weights, in one of its rounds.

    Attributes:
        bytes: the first one in shared memory.
        full: the barrier that its copies arrive at.
        empty: the barrier that those who have multiplied it arrive at.
        parity: of the round, 0 in the first.
    """

    bytes: Word
    full: Word
    empty: Word
    parity: Word


@dataclass(kw_only=True)
class Program:
    """A program while its code is made.

    Attributes:
        plan: sizes.
        activation: of the gate.
        eps: of the norms.
        factor: on scores, for powers of two.
        gain_bytes: of an element of each gain.
        at: the arrays by name.
        shared: the first byte of shared memory.
    """

    plan: Plan
    activation: Gate
    eps: float
    factor: float
    gain_bytes: Mapping[str, int]
    at: Mapping[str, Address]
    shared: Word

    def __post_init__(self) -> None:
        """Reads where the thread is, once and before all branches."""
        self.thread = control.register("tid.x")
        self.number = control.register("ctaid.x")
        self.lane = self.thread & 31
        self.warp = control.first_of_warp(self.thread >> 5)
        self.team, self.member = self.warp // TEAM, self.warp % TEAM

    @property
    def fragment(self) -> tuple[Word, Word]:
        """Of a lane: its row or token, and its place among four."""
        return self.lane >> 2, self.lane & 3

    def place(self, name: str, offset: int = 0) -> Word:
        """In shared memory."""
        return self.shared + (self.plan.places[name] + offset)

    def slot(self, team: Word, passed: Word) -> Slot:
        """The slot of a team's ring after so many that have passed.

        Each team has a ring of its own: where one is ahead of the other, a slot that both had used
        could be a round behind, whose parity is that of the next.
        """
        slots = self.plan.ring_slots
        number = team * slots + passed % slots
        return Slot(
            bytes=self.place("ring") + number * self.plan.slot_bytes,
            full=self.place("full") + number * 8,
            empty=self.place("empty") + number * 8,
            parity=(passed // slots) & 1,
        )

    def units(self, phase: Phase) -> tuple[Word, Word]:
        """The first unit of this program, and how many it has."""
        programs = self.plan.programs
        first = self.number + (programs - phase.offset)
        first = select(first.below(programs), first, first - programs)
        return first, (Word(phase.units + programs - 1) - first) // programs

    def order(self, phase: Phase) -> Word:
        """Which of the first tiles of a phase is this team's."""
        return (self.team + (TEAMS - phase.first_team)) % TEAMS

    def vector(self, name: str, token: Word | int, index: Word) -> Address:
        """A word of what programs exchange: of h, or of another vector."""
        if name == "h":
            return self.at["h"].plus(index + Word(self.plan.hidden) * token, 4)
        start, _ = self.plan.exchange[name]
        row = Word(self.plan.exchanged) * token
        return self.at["exchange"].plus(row + index + start, 4)

    def tag(self, name: str, layer: Word, *, after: str = "") -> Word:
        """Of a vector in a layer; h is another ``after`` close and after narrow.

        0 is h at the start, and what has not been sent.
        """
        if name != "h":
            return layer + 1
        return layer * 2 + {"": 0, "close": 1, "narrow": 2}[after]

    def _counter(self, phase: str) -> Address:
        return self.at["counters"].plus(4 * COUNTER_WORDS * PHASES.index(phase))

    def wait(self, phase: str, times: Word) -> None:
        """Until all programs have said so often that they have sent what they had to.

        What they have sent may still be on its way.
        """
        count = times * self.plan.participants(phase)
        control.when(self.thread.equals(0), lambda: memory.wait_count(self._counter(phase), count))
        control.meet(1, THREADS)

    def say_sent(self, phase: str) -> None:
        """Tells the others so, once all threads have."""
        control.meet(1, THREADS)
        control.when(self.thread.equals(0), lambda: memory.count(self._counter(phase)))

    def statistics(self, token: Word | int) -> Word:
        """Where the sum of a token's codes and its scale are."""
        return self.place("totals") + Word(8) * token
