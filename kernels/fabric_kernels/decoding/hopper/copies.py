"""The warp of a program that copies weights, as far ahead as there is room."""

from collections.abc import Sequence
from functools import partial

from fabric_kernels.decoding.hopper import attention, control, memory
from fabric_kernels.decoding.hopper.plan import BLOCK_BYTES, TEAMS, UNIT_ROWS, Phase
from fabric_kernels.decoding.hopper.program import Program
from fabric_kernels.decoding.hopper.values import Address, Word, select


def copy_weights(program: Program) -> None:
    """All weights of all layers, in the order in which they are multiplied."""
    phases = program.plan.phases.values()

    def layer(index: Word, *passed: Word) -> Sequence[Word]:
        control.when(program.lane.equals(0), lambda: attention.prefetch_cache(program, index))
        for phase in phases:
            _, count = program.units(phase)
            passed = tuple(control.loop(count, passed, partial(_unit, program, phase, index)))
        return passed

    control.loop(program.plan.layers, [Word(0)] * TEAMS, layer)


def _unit(
    program: Program, phase: Phase, layer: Word, index: Word, *passed: Word
) -> Sequence[Word]:
    """The tiles of a unit, each to its team; how many slots of each team have passed then."""
    start, _ = program.units(phase)
    number = start + index * program.plan.programs
    found = list(passed)
    for part, source in enumerate(_rows_of_unit(program, phase, number, layer)):
        team = (index * phase.each + (part + phase.first_team)) % TEAMS
        before = found[0]
        for other in range(1, TEAMS):
            before = select(team.equals(other), found[other], before)
        _copy_rows(program, phase, source, team, before)
        after = before + len(phase.chunks)
        found = [select(team.equals(i), after, one) for i, one in enumerate(found)]
    return found


def _rows_of_unit(program: Program, phase: Phase, number: Word, layer: Word) -> list[Address]:
    """The first rows of the tiles of a unit."""
    unit_bytes = UNIT_ROWS * phase.row_bytes
    bases = [
        program.at[f"{name}_packed"].plus(layer, rows * phase.row_bytes)
        for name, rows in zip(phase.matrices, phase.rows, strict=True)
    ]
    if phase.paired:
        return [base.plus(number, unit_bytes) for base in bases]
    found, first = bases[0].plus(number, unit_bytes), 0
    for base, rows in zip(bases[1:], phase.rows[:-1], strict=True):
        first += rows // UNIT_ROWS
        later = number.below(first)
        own = select(later, Word(0), number - first)
        found = select(later, found, base.plus(own, unit_bytes))
    return [found]


def _copy_rows(program: Program, phase: Phase, source: Address, team: Word, passed: Word) -> None:
    """Sixteen rows, a chunk a slot; sixteen lanes ask for one each."""
    plan, start = program.plan, 0
    for number, blocks in enumerate(phase.chunks):
        size = blocks * BLOCK_BYTES
        slot = program.slot(team, passed + number)
        memory.wait(slot.empty, slot.parity ^ 1)
        control.when(program.lane.equals(0), partial(memory.expect, slot.full, UNIT_ROWS * size))
        control.meet_warp()
        into = slot.bytes + program.lane * plan.row_stride
        row = source.plus(program.lane, phase.row_bytes).plus(start)
        ask = partial(memory.copy, into, row, size, slot.full)
        control.when(program.lane.below(UNIT_ROWS), ask)
        start += size
