"""Shared and global memory as a thread sees it.

All of it is inline PTX with side effects, so that it stays in the order in which it is written.
"""

from collections.abc import Sequence
from typing import Any

from fabric_kernels.decoding.hopper.values import Address, Float, Word, ptx, ptx_early


def load_shared(at: Word) -> Word:
    """A word."""
    return ptx("ld.shared.b32 $0, [$1];", "r", at, effects=True)


def load_shared_2(at: Word) -> list[Word]:
    """Two words that follow one another, from a multiple of 8 bytes."""
    return ptx("ld.shared.v2.b32 {$0, $1}, [$2];", "rr", at, effects=True)


def load_shared_4(at: Word) -> list[Word]:
    """Four words that follow one another, from a multiple of 16 bytes."""
    return ptx("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", "rrrr", at, effects=True)


def load_shared_4_if(condition: Any, at: Word) -> list[Word]:
    """As ``load_shared_4``; zeros where not."""
    text = (
        "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;"
        " @$5 ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];"
    )
    return ptx_early("rrrr", text, at, condition)


def store_shared(at: Word, value: Word | Float) -> None:
    """Four bytes."""
    ptx("st.shared.b32 [$0], $1;", "", at, value, effects=True)


def store_shared_4(at: Word, values: Sequence[Float]) -> None:
    """Sixteen bytes, to a multiple of so many."""
    ptx("st.shared.v4.b32 [$0], {$1, $2, $3, $4};", "", at, *values, effects=True)


def store_shared_half(at: Word, value: Word) -> None:
    """The lower two bytes."""
    ptx(
        "{ .reg .b16 l, h; mov.b32 {l, h}, $1; st.shared.b16 [$0], l; }",
        "",
        at,
        value,
        effects=True,
    )


def add_shared(at: Word, value: Word) -> None:
    """Adds to a word that other threads add to."""
    ptx("red.shared.add.s32 [$0], $1;", "", at, value, effects=True)


def load(at: Address) -> Word:
    """A word that nobody writes meanwhile."""
    return ptx("ld.global.nc.b32 $0, [$1];", "r", at, effects=True)


def load_if(condition: Any, at: Address) -> Word:
    """A word that nobody writes meanwhile; zero where not."""
    (word,) = ptx_early("r", "mov.b32 $0, 0; @$2 ld.global.nc.b32 $0, [$1];", at, condition)
    return word


def load_4_if(condition: Any, at: Address) -> list[Word]:
    """Four words that nobody writes meanwhile; zeros where not."""
    text = (
        "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;"
        " @$5 ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];"
    )
    return ptx_early("rrrr", text, at, condition)


def store_half(at: Address, value: Float) -> None:
    """A bfloat16."""
    ptx(
        "{ .reg .b16 h; cvt.rn.bf16.f32 h, $1; st.global.b16 [$0], h; }",
        "",
        at,
        value,
        effects=True,
    )


TAG_BITS = 0xFFFF
"""Of a word that programs exchange; the rest is a bfloat16."""


def send(at: Address, value: "Float", tag: Word) -> None:
    """A bfloat16 with a tag, as one word."""
    word = (value.in_bfloat16().bits() & 0xFFFF0000) | tag
    ptx("st.relaxed.gpu.global.b32 [$0], $1;", "", at, word, effects=True)


def receive(places: Sequence[tuple[Any, Address]], tag: Word) -> list[Float]:
    """A value from each of some addresses, once all are there with this tag.

    Args:
        places: a condition and an address; zero where not.
        tag: 16 bits.
    """
    return [x for (x,) in _received(places, tag, 1)]


def receive_8(places: Sequence[tuple[Any, Address]], tag: Word) -> list[list[Float]]:
    """As ``receive``, eight values that follow one another, from multiples of 32 bytes."""
    return _received(places, tag, 8)


def _received(places: Sequence[tuple[Any, Address]], tag: Word, each: int) -> list[list[Float]]:
    count = each * len(places)
    word, names = [f"${i}" for i in range(count)], range(len(places))
    lines = [f"mov.b32 {one}, 0;" for one in word]
    lines.append("{ .reg .pred p; .reg .b32 t, u; LOOK: mov.b32 u, 0;")
    for i in names:
        address, condition = f"${count + 2 * i}", f"${count + 2 * i + 1}"
        own = word[each * i : each * (i + 1)]
        if each == 1:
            lines.append(f"@{condition} ld.relaxed.gpu.global.b32 {own[0]}, [{address}];")
        for j in range(0, each - 3, 4):
            four = ", ".join(own[j : j + 4])
            lines.append(
                f"@{condition} ld.relaxed.gpu.global.v4.b32 {{{four}}}, [{address} + {4 * j}];"
            )
    expected = f"${count + 2 * len(places)}"
    for i in names:
        own = word[each * i : each * (i + 1)]
        lines.append(f"xor.b32 t, {own[0]}, {expected};")
        # t | (word ^ expected)
        lines += [f"lop3.b32 t, t, {one}, {expected}, 0xF6;" for one in own[1:]]
        lines.append(f"@${count + 2 * i + 1} or.b32 u, u, t;")
    lines.append(f"and.b32 u, u, {TAG_BITS}; setp.ne.b32 p, u, 0; @p bra LOOK; }}")
    flat = [value for condition, address in places for value in (address, condition)]
    found = ptx_early("r" * count, " ".join(lines), *flat, tag)
    values = [(one & 0xFFFF0000).bits_as_float() for one in found]
    return [values[i : i + each] for i in range(0, count, each)]


def count(counter: Address) -> None:
    """Adds one, whenever."""
    ptx("red.relaxed.gpu.global.add.u32 [$0], 1;", "", counter, effects=True)


def wait_count(counter: Address, least: Word) -> None:
    """Until it is so much; by one thread."""
    text = (
        "{ .reg .pred p; .reg .b32 v; LOOK: ld.relaxed.gpu.global.b32 v, [$0];"
        " setp.lt.s32 p, v, $1; @p bra LOOK; }"
    )
    ptx(text, "", counter, least, effects=True)


def begin_barrier(at: Word, arrivals: int) -> None:
    """A barrier of shared memory."""
    ptx(f"mbarrier.init.shared.b64 [$0], {arrivals};", "", at, effects=True)


def show_barriers() -> None:
    """Those that have begun, to the units that copy."""
    ptx("fence.mbarrier_init.release.cluster;", "", effects=True)
    ptx("fence.proxy.async.shared::cta;", "", effects=True)


def arrive(at: Word) -> None:
    """At a barrier of shared memory."""
    ptx("{ .reg .b64 s; mbarrier.arrive.shared.b64 s, [$0]; }", "", at, effects=True)


def expect(at: Word, size: int) -> None:
    """Arrives at a barrier that so many bytes arrive at too."""
    text = f"{{ .reg .b64 s; mbarrier.arrive.expect_tx.shared.b64 s, [$0], {size}; }}"
    ptx(text, "", at, effects=True)


def wait(at: Word, parity: Word) -> None:
    """Until the phase of this parity is over."""
    text = "{ .reg .pred p; LOOK: mbarrier.try_wait.parity.shared.b64 p, [$0], $1; @!p bra LOOK; }"
    ptx(text, "", at, parity, effects=True)


def copy(into: Word, source: Address, size: int, barrier: Word) -> None:
    """Begins to copy bytes, multiples of 16, from global to shared memory."""
    text = (
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
        f" [$0], [$1], {size}, [$2];"
    )
    ptx(text, "", into, source, barrier, effects=True)


def prefetch(source: Address, size: Word) -> None:
    """Asks for bytes, a multiple of 16, in the second-level cache."""
    ptx("cp.async.bulk.prefetch.L2.global [$0], $1;", "", source, size, effects=True)
