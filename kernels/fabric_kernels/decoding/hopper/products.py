"""Sums of products of the weights in shared memory and the codes of all tokens.

Weights are multiplied as they are packed, four to a byte. The matrix units have eight columns, and
a token fills four of them with the codes that meet each of the four fields of a byte: which
products of whole and masked bytes with all of these give that of the fields is in ``_add_up``.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from fabric_kernels.decoding.hopper import control, memory
from fabric_kernels.decoding.hopper.plan import (
    BLOCK_BYTES,
    BLOCK_CODES,
    TEAM,
    TEAMS,
    UNIT_ROWS,
    Phase,
)
from fabric_kernels.decoding.hopper.program import Program
from fabric_kernels.decoding.hopper.values import Word, multiply, select

MASKS = (None, 0x0F0F0F0F, 0x33333333, 0x03030303)
"""Of the bytes of a word: everything, fields 0 and 1, fields 0 and 2, field 0."""


def tile(program: Program, phase: Phase, passed: Word, turn: Word) -> list[Any]:
    """The sums of a tile, over all k of its rows: blocks go to the warps of a team in turn.

    Args:
        program: it.
        phase: of the product.
        passed: slots of the team before the phase.
        turn: tiles of the team before this one.
    """
    plan, blocks = program.plan, sum(phase.chunks)
    sums, done = [Word(0) for _ in range(16 * plan.column_tiles)], 0
    for number, count in enumerate(phase.chunks):
        slot = program.slot(program.team, passed + (turn * len(phase.chunks) + number))
        memory.wait(slot.full, slot.parity)
        turned = (program.member - turn * blocks - done) & (TEAM - 1)
        for first in range(0, count, TEAM):
            block = turned + first
            run = partial(_block, program, slot.bytes, block, done)
            if first + TEAM <= count:
                sums = run(*sums)
            else:
                sums = control.changed_if(block.below(count), sums, run)
        control.meet_warp()
        control.when(program.lane.equals(0), partial(memory.arrive, slot.empty))
        done += count
    _add_up(program, turn * TEAMS + program.order(phase), sums)
    return []


def _block(program: Program, base: Word, block: Word, before: int, *sums: Word) -> list[Word]:
    """Sixteen rows by 256 k: four products of every byte with all four codes that it meets.

    Of the products of the byte as it is, of two of its fields at a time and of the lowest alone,
    with column f the codes of field f, what is wanted follows (:func:`_add_up`). That takes three
    masks a word; fields one by one would take four, and shifts.
    """
    plan, (group, place) = program.plan, program.fragment
    row = base + group * plan.row_stride + block * BLOCK_BYTES + place * 16
    upper, lower = memory.load_shared_4(row), memory.load_shared_4(row + 8 * plan.row_stride)
    found = list(sums)
    for half in range(plan.column_tiles):
        token = (group >> 2) + 2 * half
        at = program.place("work") + token * plan.token_bytes + (group & 3) * 16
        at = at + (block + before) * BLOCK_CODES + place * 64
        codes = memory.load_shared_4_if(token.below(plan.rows), at)
        for w in (0, 2):
            words = [upper[w], lower[w], upper[w + 1], lower[w + 1]]
            for i, mask in enumerate(MASKS):
                own = slice(16 * half + 4 * i, 16 * half + 4 * (i + 1))
                fields = words if mask is None else [word & mask for word in words]
                found[own] = multiply(found[own], fields, codes[w : w + 2])
    return found


def _add_up(program: Program, tile: Word, sums: Sequence[Word]) -> None:
    """A warp's part of the sums of a tile, added to those of the others.

    Of a token, fields 0 and 1 are in one lane, 2 and 3 in the next one. With products of the whole
    byte a, of fields 0 and 1 b, of 0 and 2 c, of 0 alone d, in columns 0 to 3: the sum is
    ``d0 + (b1 - d1)/4 + (c2 - d2)/16 + (a3 - b3 - c3 + d3)/64``.
    """
    plan, (group, place) = program.plan, program.fragment
    is_even = (place & 1).equals(0)
    for half in range(plan.column_tiles):
        token = (place >> 1) + 2 * half
        at = program.place("sums") + (tile * plan.rows + token) * (4 * UNIT_ROWS) + group * 4
        totals: list[Word] = []
        for row in range(2):
            first, second = (
                [sums[16 * half + 4 * i + 2 * row + column] for i in range(4)]
                for column in range(2)
            )
            low = first[3] + (second[1] - second[3]).shifted(2)
            high = (first[2] - first[3]).shifted(4)
            high = high + (second[0] - second[1] - second[2] + second[3]).shifted(6)
            totals.append(select(is_even, low, high))

        def add(at: Word = at, totals: list[Word] = totals) -> None:
            memory.add_shared(at, totals[0])
            memory.add_shared(at + 32, totals[1])

        control.when(token.below(plan.rows), add)
