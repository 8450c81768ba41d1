"""Attention of the Mosaic GPU decoding kernel: one query of one row at a time.

The lanes of a warp that have a vector of a head, eight channels each, are a *stream*: it attends to
every n-th slot, with a largest score, a sum of weights and weighted values of its own (Milakov and
Gimelshein 2018, "Online normalizer calculation for softmax"), which are put together at the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fabric_kernels.decoding.hopper import control, memory
from fabric_kernels.decoding.hopper.plan import THREADS, WARPS
from fabric_kernels.decoding.hopper.program import Program
from fabric_kernels.decoding.hopper.values import (
    Address,
    Float,
    Word,
    as_float,
    both,
    select,
    unpack_halves,
)

CHANNELS = 8
"""Of a lane: 16 bytes."""
AHEAD = 4
"""Slots of a stream that are asked for at once."""
FAR = -1e30


def prefetch_cache(program: Program, layer: Word) -> None:
    """Asks for the keys and values of this program's queries in the second-level cache."""
    plan = program.plan

    def item(turn: Word) -> list[Any]:
        row, query = _item(program, turn)
        stop = memory.load(program.at["positions"].plus(row, 4)).least(plan.slots)

        def ask() -> None:
            for name in ("keys", "values"):
                size = stop * (2 * plan.width)
                memory.prefetch(_vectors(program, name, layer, row, query), size)

        control.when(Word(0).below(stop), ask)
        return []

    control.loop(_items(program), [], item)


def attend(program: Program, layer: Word) -> None:
    """Every query of this program: turns, stores the new key and value, and attends."""

    def item(turn: Word) -> list[Any]:
        _query(program, layer, *_item(program, turn))
        return []

    def run() -> None:
        control.loop(_items(program), [], item)
        program.say_sent("attend")

    control.when(Word(0).below(_items(program)), run)


def _items(program: Program) -> Word:
    """How many queries a program has."""
    programs = program.plan.programs
    queries = program.plan.rows * program.plan.heads
    return (Word(queries + programs - 1) - program.number) // programs


def _item(program: Program, turn: Word) -> tuple[Word, Word]:
    """Row and query head."""
    number = program.number + turn * program.plan.programs
    return number // program.plan.heads, number % program.plan.heads


def _vectors(program: Program, name: str, layer: Word, row: Word, query: Word) -> Address:
    """Slot 0 of a head in the cache."""
    plan = program.plan
    head = query // (plan.heads // plan.kv_heads)
    head_bytes = 2 * plan.width * plan.slots
    base = program.at[name].plus(layer, plan.rows * plan.kv_heads * head_bytes)
    return base.plus(row * plan.kv_heads + head, head_bytes)


def _query(program: Program, layer: Word, row: Word, query: Word) -> None:
    plan = program.plan
    own = program.lane & (plan.lanes - 1)
    stream = program.warp * (32 // plan.lanes) + program.lane // plan.lanes
    active = own.below(plan.width // CHANNELS)
    position = memory.load(program.at["positions"].plus(row, 4))
    is_new, stop = position.below(plan.slots), position.least(plan.slots)
    keys, values = (_vectors(program, name, layer, row, query) for name in ("keys", "values"))
    # What is known before the new token is asked for first.
    bases = keys.plus(own, 2 * CHANNELS), values.plus(own, 2 * CHANNELS)
    ask = partial(_ask, program, bases, (stream, stop, active))
    first = ask(Word(0))
    angles = _angles(program, row)
    program.wait("project", layer + 1)
    places = keys.plus(position, 2 * plan.width), values.plus(position, 2 * plan.width)
    owner = both(is_new, (query % (plan.heads // plan.kv_heads)).equals(0))
    _receive(program, layer, (row, query), angles, (owner, *places))
    asked = _new(program, 0, own)
    none = [Float(FAR), Float(0.0), *[Float(0.0)] * CHANNELS]
    sums = _slots(program, asked, first, none)
    rounds = (stop + (plan.streams * AHEAD - 1)) // (plan.streams * AHEAD)
    rest = select(Word(1).below(rounds), rounds - 1, Word(0))
    sums = control.loop(rest, sums, lambda i, *sums: _slots(program, asked, ask(i + 1), sums))

    def score() -> None:
        (found,) = _score(program, asked, [_new(program, 1, own)])
        found = select(is_new, found, Float(FAR))
        control.when(program.lane.equals(0), lambda: _set_stream(program, Word(WARPS), found, 1.0))

    control.when(program.warp.equals(0), score)
    _together(program, layer, sums, (own, active), (row, query))


def _angles(program: Program, row: Word) -> tuple[Float, Float]:
    """Cosine and sine of a row's position for a thread's pair of channels, in bfloat16."""
    half = program.plan.width // 2
    pair = program.thread % half
    there = program.thread.below(program.plan.width)
    cos, sin = (
        memory.load_if(there, program.at[name].plus(row * half + pair, 4))
        for name in ("cos", "sin")
    )
    return cos.bits_as_float().in_bfloat16(), sin.bits_as_float().in_bfloat16()


def _receive(
    program: Program,
    layer: Word,
    place: tuple[Word, Word],
    angles: tuple[Float, Float],
    cache: tuple[Any, Address, Address],
) -> None:
    """The new query, key and value in shared memory, the first two turned by their position.

    Of the first hd threads the first half turns pairs of channels of the query, the second half of
    the key; each step is rounded as ``xla.rotate``'s.

    Args:
        program: it.
        layer: the layer.
        place: row, and query head.
        angles: of a thread's pair.
        cache: whether key and value are to be stored, and where.
    """
    plan, thread, (row, query) = program.plan, program.thread, place
    width, half = plan.width, plan.width // 2
    head = query // (plan.heads // plan.kv_heads)
    is_query, pair = thread.below(half), thread % half

    def run() -> None:
        vectors = [
            program.vector("q", row, query * width + pair),
            program.vector("k", row, head * width + pair),
        ]
        vector = select(is_query, *vectors)
        always = Word(0).equals(0)
        value_at = program.vector("v", row, head * width + thread)
        wanted = [(always, at) for at in (vector, vector.plus(4 * half), value_at)]
        first, second, value = memory.receive(wanted, program.tag("q", layer))
        cos, sin = angles
        turned = (
            ((first * cos).in_bfloat16() - (second * sin).in_bfloat16()).in_bfloat16(),
            ((second * cos).in_bfloat16() + (first * sin).in_bfloat16()).in_bfloat16(),
        )
        base = select(is_query, program.place("new"), program.place("new", 4 * width))
        for i, x in enumerate(turned):
            memory.store_shared(base + pair * 4 + 4 * half * i, x)
        memory.store_shared(program.place("new", 8 * width) + thread * 4, value)
        stored, keys, values = cache

        def store() -> None:
            memory.store_half(values.plus(thread, 2), value)

            def store_key() -> None:
                for i, x in enumerate(turned):
                    memory.store_half(keys.plus(pair, 2).plus(2 * half * i), x)

            control.either(is_query, lambda: None, store_key)

        control.when(stored, store)

    control.when(thread.below(width), run)
    control.meet(1, THREADS)


def _new(program: Program, which: int, own: Word) -> list[Float]:
    """A lane's channels of the new query, key or value; zeros of lanes without any."""
    width, lanes = program.plan.width, program.plan.lanes
    active = own.below(width // CHANNELS)
    within = select(active, own, Word(0))
    at = program.place("new", 4 * width * which) + within * (4 * CHANNELS)
    found = [word.bits_as_float() for i in (0, 16) for word in memory.load_shared_4(at + i)]
    if lanes * CHANNELS == width:
        return found
    return [select(active, x, Float(0.0)) for x in found]


def _score(
    program: Program, asked: Sequence[Float], keys: Sequence[Sequence[Float]]
) -> list[Float]:
    """Of some keys, in all lanes of a stream."""
    scores: list[Float] = []
    for key in keys:
        score = Float(0.0)
        for x, y in zip(asked, key, strict=True):
            score = x.times_plus(y, score)
        scores.append(score)
    distance = program.plan.lanes // 2
    while distance:
        scores = [score + control.exchange(score, distance) for score in scores]
        distance //= 2
    return [score * program.factor for score in scores]


@dataclass(frozen=True)
class Asked:
    """Slots that have been asked for.

    Attributes:
        seen: whether a slot is there to be seen.
        keys: four words each.
        values: likewise.
    """

    seen: list[Any]
    keys: list[list[Word]]
    values: list[list[Word]]


def _ask(
    program: Program,
    bases: tuple[Address, Address],
    bounds: tuple[Word, Word, Any],
    turn: Word,
) -> Asked:
    """The next slots of a stream; ``bounds`` are it, where slots end, and whether a lane reads."""
    plan, (stream, stop, active) = program.plan, bounds
    slots = [(turn * AHEAD + i) * plan.streams + stream for i in range(AHEAD)]
    seen = [slot.below(stop) for slot in slots]
    keys, values = (
        [
            memory.load_4_if(both(there, active), base.plus(slot, 2 * plan.width))
            for slot, there in zip(slots, seen, strict=True)
        ]
        for base in bases
    )
    return Asked(seen, keys, values)


def _slots(
    program: Program, query: Sequence[Float], asked: Asked, sums: Sequence[Float]
) -> list[Float]:
    """The sums with some slots more."""
    scores = _score(program, query, [unpack_halves(words) for words in asked.keys])
    scores = [
        select(there, score, Float(FAR)) for score, there in zip(scores, asked.seen, strict=True)
    ]
    return _add(sums, scores, [unpack_halves(words) for words in asked.values], asked.seen)


def _add(
    sums: Sequence[Float],
    scores: Sequence[Float],
    values: Sequence[Sequence[Float]],
    there: Sequence[Any],
) -> list[Float]:
    """The largest score, the weights' sum and the weighted values, with some slots more."""
    largest = sums[0]
    for score in scores:
        largest = largest.most(score)
    shrink = (sums[0] - largest).power_of_two()
    total, mixed = sums[1] * shrink, [x * shrink for x in sums[2:]]
    for score, value, own in zip(scores, values, there, strict=True):
        weight = select(own, (score - largest).power_of_two(), Float(0.0))
        total = total + weight
        mixed = [weight.times_plus(x, y) for x, y in zip(value, mixed, strict=True)]
    return [largest, total, *mixed]


def _together(
    program: Program,
    layer: Word,
    sums: Sequence[Float],
    lane: tuple[Word, Any],
    place: tuple[Word, Word],
) -> None:
    """What all streams found, put together and sent: first in a warp, then of all warps."""
    plan, (own, active), (row, query) = program.plan, lane, place
    distance = plan.lanes
    while distance < 32:
        sums = _merged(sums, [control.exchange(x, distance) for x in sums])
        distance *= 2
    values_at = _values_place(program)

    def write() -> None:
        _set_stream(program, program.warp, sums[0], sums[1])

    def write_values() -> None:
        base = values_at + (program.warp * plan.width + own * CHANNELS) * 4
        for i in range(0, CHANNELS, 4):
            memory.store_shared_4(base + 4 * i, sums[2 + i : 6 + i])

    control.when(program.lane.equals(0), write)
    control.when(both(active, program.lane.below(plan.lanes)), write_values)
    control.meet(1, THREADS)

    def channel() -> None:
        streams = [_stream(program, i) for i in range(WARPS + 1)]
        at = [values_at + i * 4 * plan.width for i in range(WARPS)]
        at.append(program.place("new", 8 * plan.width))
        values = [memory.load_shared(one + program.thread * 4).bits_as_float() for one in at]
        largest = streams[0][0]
        for score, _ in streams[1:]:
            largest = largest.most(score)
        total, mixed = Float(0.0), Float(0.0)
        for (score, weight), value in zip(streams, values, strict=True):
            shrink = (score - largest).power_of_two()
            total = shrink.times_plus(weight, total)
            mixed = shrink.times_plus(value, mixed)
        place = program.vector("attended", row, query * plan.width + program.thread)
        memory.send(place, mixed.over(total), program.tag("attended", layer))

    control.when(program.thread.below(plan.width), channel)
    control.meet(1, THREADS)


def _values_place(program: Program) -> Word:
    """Where the weighted values of warps are, before those of the new token."""
    return program.place("work", 8 * (WARPS + 4))


def _set_stream(program: Program, number: Word, largest: Float, weights: Float | float) -> None:
    """The largest score and the weights' sum of a warp, or of the new token after all warps."""
    at = program.place("work") + number * 8
    memory.store_shared(at, largest)
    memory.store_shared(at + 4, as_float(weights))


def _stream(program: Program, number: int) -> tuple[Float, Float]:
    first, second = memory.load_shared_2(program.place("work", 8 * number))
    return first.bits_as_float(), second.bits_as_float()


def _merged(one: Sequence[Float], other: Sequence[Float]) -> list[Float]:
    """The sums of two streams."""
    largest = one[0].most(other[0])
    shrink, also = ((sums[0] - largest).power_of_two() for sums in (one, other))
    return [
        largest,
        *[also.times_plus(y, x * shrink) for x, y in zip(one[1:], other[1:], strict=True)],
    ]
