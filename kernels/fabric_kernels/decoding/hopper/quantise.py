"""A vector as the products of the Mosaic GPU decoding kernel take it."""

from collections.abc import Callable

import numpy as np

from fabric_kernels.absmax import EPSILON
from fabric_kernels.decoding.hopper import control, memory
from fabric_kernels.decoding.hopper.plan import THREADS, WARPS
from fabric_kernels.decoding.hopper.program import Program
from fabric_kernels.decoding.hopper.values import (
    Float,
    Word,
    add_two_bytes,
    low_bytes,
    most_halves,
    pack_halves,
    tree,
    unpack_halves,
)

EPSILON_BITS = int(np.float32(EPSILON).view(np.int32))
PIECE = 8
"""Elements that a thread has side by side."""
MOST_PLACES = 4
"""Pieces that are waited for together."""

Token = list[list[Float]]
"""Pieces of a thread."""


def quantise(
    program: Program,
    source: tuple[str, str],
    k: int,
    layer: Word,
    ready: Callable[[], Word],
) -> None:
    """All tokens of a vector, normalised where there is a gain, as codes in shared memory.

    Every program does it for itself, which costs less than another exchange. The codes that meet
    field f of the four bytes of a packed word, 4b + f of 16, are a word; four of these, of packed
    words that follow one another, are what a lane loads at once.

    Args:
        program: it and its arrays.
        source: names of the vector [B, k] and of the gain [L, k].
        k: a multiple of 256.
        layer: of the gain.
        ready: waits for the vector, and gives its tag.
    """
    plan, name = program.plan, source[1]
    places = [program.thread + start for start in range(0, k // PIECE, THREADS)]
    inside = [place.below(k // PIECE) for place in places]
    gains = [
        _gain(program, name, layer, k, place, there)
        for place, there in zip(places, inside, strict=True)
        if name in program.at
    ]
    values = _receive(program, source[0], places, inside, ready())
    if gains:
        values = _normalise(program, values, gains, k)
    largest = _largest(program, values)
    for t, (token, most) in enumerate(zip(values, largest, strict=True)):
        scale = most.reciprocal() * 127.0
        total = Word(0)
        base = program.place("work", t * plan.token_bytes)
        for place, there, piece in zip(places, inside, token, strict=True):
            # No product is beyond 127: the largest one is rounded from 127 (1 + 2^-23).
            codes = [(x * scale).nearest_byte() for x in piece]
            pairs = [low_bytes(codes[field], codes[4 + field]) for field in range(4)]
            for pair in pairs:
                total = add_two_bytes(total, pair)
            control.when(there, lambda at=base, p=place, c=pairs: _store(at, p, c))
        total = control.sum_of_warp(total)
        at = program.statistics(t)
        control.when(program.lane.equals(0), lambda at=at, n=total: memory.add_shared(at, n))
        control.when(
            program.thread.equals(0),
            lambda at=at, s=scale: memory.store_shared(at + 4, s),
        )
    control.meet(1, THREADS)


def _receive(
    program: Program, name: str, places: list[Word], inside: list[object], tag: Word
) -> list[Token]:
    """Every token's pieces, as soon as they are there."""
    wanted = [
        (there, program.vector(name, t, place * PIECE))
        for t in range(program.plan.rows)
        for place, there in zip(places, inside, strict=True)
    ]
    found: Token = []
    for i in range(0, len(wanted), MOST_PLACES):
        found += memory.receive_8(wanted[i : i + MOST_PLACES], tag)
    count = len(places)
    return [found[i : i + count] for i in range(0, len(found), count)]


def _gain(
    program: Program, name: str, layer: Word, k: int, place: Word, there: object
) -> list[Float]:
    """Eight elements, in bfloat16."""
    size = program.gain_bytes[name]
    at = program.at[name].plus(layer, k * size).plus(place, PIECE * size)
    words = memory.load_4_if(there, at)
    if size == 2:
        return unpack_halves(words)
    words += memory.load_4_if(there, at.plus(16))
    return [word.bits_as_float().in_bfloat16() for word in words]


def _normalise(
    program: Program, values: list[Token], gains: list[list[Float]], k: int
) -> list[Token]:
    """The RMS norm of each token; steps rounded as ``rms_norm``'s."""
    for t, token in enumerate(values):
        sums = [Float(0.0) for _ in range(4)]
        for piece in token:
            for i, x in enumerate(piece):
                sums[i % 4] = x.times_plus(x, sums[i % 4])
        total = (sums[0] + sums[1]) + (sums[2] + sums[3])
        for distance in (16, 8, 4, 2, 1):
            total = total + control.exchange(total, distance)
        at = program.place("squares", 4 * WARPS * t) + program.warp * 4
        control.when(program.lane.equals(0), lambda at=at, s=total: memory.store_shared(at, s))
    control.meet(1, THREADS)
    found: list[Token] = []
    for t, token in enumerate(values):
        first = program.place("squares", 4 * WARPS * t)
        parts = [
            w.bits_as_float()
            for i in range(0, 4 * WARPS, 16)
            for w in memory.load_shared_4(first + i)
        ]
        total = tree(parts, lambda a, b: a + b)
        inverse = (total.over(float(k)) + program.eps).inverse_root()
        found.append(
            [_normal(piece, inverse, own) for piece, own in zip(token, gains, strict=True)]
        )
    return found


def _normal(piece: list[Float], inverse: Float, gain: list[Float]) -> list[Float]:
    rounded = unpack_halves(pack_halves([x * inverse for x in piece]))
    products = [x * own for x, own in zip(rounded, gain, strict=True)]
    return unpack_halves(pack_halves(products))


def _largest(program: Program, values: list[Token]) -> list[Float]:
    """The largest magnitude of each token, at least that of the quantiser."""
    for t, token in enumerate(values):
        halves = [word & 0x7FFF7FFF for piece in token for word in pack_halves(piece)]
        pair = tree(halves, most_halves)
        most = (pair << 16).most_unsigned(pair & 0xFFFF0000)
        most = control.most_of_warp(most.most_unsigned(Word(EPSILON_BITS)))
        at = program.place("largest", 4 * WARPS * t) + program.warp * 4
        control.when(program.lane.equals(0), lambda at=at, m=most: memory.store_shared(at, m))
        control.when(
            program.thread.equals(0),
            lambda t=t: memory.store_shared(program.statistics(t), Word(0)),
        )
    control.meet(1, THREADS)
    found: list[Float] = []
    for t in range(len(values)):
        first = program.place("largest", 4 * WARPS * t)
        parts = [word for i in range(0, 4 * WARPS, 16) for word in memory.load_shared_4(first + i)]
        found.append(tree(parts, Word.most_unsigned).bits_as_float())
    return found


def _store(base: Word, place: Word, pairs: list[Word]) -> None:
    """Eight codes of a group of 16, the first or the second half of it."""
    group = place >> 1
    at = base + (group >> 2) * 64 + (group & 3) * 4 + (place & 1) * 2
    for field, pair in enumerate(pairs):
        memory.store_shared_half(at + 16 * field, pair)
