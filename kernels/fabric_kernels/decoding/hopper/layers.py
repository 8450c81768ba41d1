"""The Mosaic GPU kernel of a step of decoding through all layers, for Hopper.

Five phases a layer: q, k and v; attention; o; gate and up; down. What a phase reads of other
programs comes late, but which weights it will need is known from the start: so one warp of each
program does nothing but copy weights into a ring of shared memory, as far ahead as the ring is
long. Memory is rarely idle, and the other warps find their weights there when the vector is.

Programs have no barrier, which would wait for what is stored to be seen by all: 1,400 cycles on an
H200, five times a layer. Every value that they exchange is a word with a tag, of the layer and the
phase; who needs it waits until so many programs have said that they have sent theirs, which may
still be on its way, then looks until the tags are there. A word is overwritten a layer later, by a
program that has by then received what depended on every reading of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fabric_kernels.attention.cache import KVCache
from fabric_kernels.decoding.hopper import attention, control, memory, products
from fabric_kernels.decoding.hopper.copies import copy_weights
from fabric_kernels.decoding.hopper.outputs import Outputs
from fabric_kernels.decoding.hopper.plan import (
    COUNTER_WORDS,
    PHASES,
    TEAM,
    TEAMS,
    THREADS,
    UNIT_ROWS,
    WARPS,
    Plan,
    make_plan,
)
from fabric_kernels.decoding.hopper.program import Program
from fabric_kernels.decoding.hopper.quantise import quantise
from fabric_kernels.decoding.hopper.values import Address, Word, shared_base
from fabric_kernels.decoding.stacks import LayerStacks

ALL_THREADS = THREADS + 128
"""Of a program: one warp of the last warpgroup copies, the others of it do nothing."""
COMPUTE_REGISTERS, COPY_REGISTERS = 112, 24
LOG2_E = 1.4426950408889634


def decode_layers(
    h: jax.Array,
    stacks: LayerStacks,
    cache: KVCache,
    positions: jax.Array,
    angles: tuple[jax.Array, jax.Array],
    scale: float,
    *,
    programs: int,
) -> tuple[jax.Array, KVCache]:
    """As :func:`fabric_kernels.decoding.decode_layers`, what is given checked; bfloat16.

    ``programs`` must all be able to run at the same time.
    """
    plan = make_plan(stacks, cache, len(h), programs)
    inputs, changed = arrays(plan, h, stacks, cache, positions, angles)
    in_place = {name: jax.new_ref(array) for name, array in changed.items()}
    settings = partial(
        Program,
        plan=plan,
        activation=stacks.activation,
        eps=stacks.eps,
        factor=score_factor(scale),
        gain_bytes={name: gain.dtype.itemsize for name, gain in stacks.gains.items()},
    )
    pl.kernel(
        partial(_kernel, names=[*inputs, *in_place], size=plan.shared_bytes, make=settings),
        out_type=(),
        mesh=plgpu.Mesh(
            grid=(programs,),
            grid_names=("program",),
            num_threads=ALL_THREADS // 128,
            thread_name="warpgroup",
        ),
        compiler_params=plgpu.CompilerParams(),
        name="decode_layers",
    )(*inputs.values(), *in_place.values())
    new = replace(cache, keys=in_place["keys"][...], values=in_place["values"][...])
    return _untagged(in_place["h"][...]).reshape(h.shape), new


def arrays(
    plan: Plan,
    h: jax.Array,
    stacks: LayerStacks,
    cache: KVCache,
    positions: jax.Array,
    angles: tuple[jax.Array, jax.Array],
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """What the kernel reads, and what it changes, by name."""
    inputs = {
        "positions": positions,
        "cos": angles[0],
        "sin": angles[1],
        **stacks.gains,
        **{f"{name}_packed": matrix.packed for name, matrix in stacks.matrices.items()},
        **{f"{name}_scale": matrix.scale for name, matrix in stacks.matrices.items()},
    }
    changed = {
        "h": _tagged(h.reshape(len(h), -1)),
        "exchange": jnp.zeros((plan.rows, plan.exchanged), jnp.uint32),
        "counters": jnp.zeros((len(PHASES), COUNTER_WORDS), jnp.uint32),
        "keys": cache.keys,
        "values": cache.values,
    }
    return inputs, changed


def score_factor(scale: float) -> float:
    """What scores are multiplied with, for powers of two."""
    return scale * LOG2_E


def _tagged(x: jax.Array) -> jax.Array:
    """Words of bfloat16 and the tag 0."""
    return lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16


def _untagged(words: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type((words >> 16).astype(jnp.uint16), jnp.bfloat16)


def _kernel(*refs: Any, names: Sequence[str], size: int, make: Callable[..., Program]) -> None:
    def scoped(shared: Any) -> None:
        def run(context: Any, *own: Any) -> None:
            del context
            at = {name: Address.of(array) for name, array in zip(names, own[:-1], strict=True)}
            run_program(make(at=at, shared=shared_base(own[-1])))

        types = (plgpu.RefType(),) * (len(refs) + 1)
        plgpu.inline_mgpu(arg_types=types)(run)(*refs, shared)

    pl.run_scoped(scoped, plgpu.SMEM((size,), jnp.uint8), collective_axes="warpgroup")


def run_program(program: Program) -> None:
    """What all threads of a program do."""
    plan = program.plan
    warp = program.warp

    def begin() -> None:
        for slot in range(TEAMS * plan.ring_slots):
            memory.begin_barrier(program.place("full", 8 * slot), 1)
            memory.begin_barrier(program.place("empty", 8 * slot), TEAM)
        memory.show_barriers()

    control.when(program.thread.equals(0), begin)
    words = UNIT_ROWS * plan.tiles * plan.rows
    for start in range(0, words, ALL_THREADS):
        place = program.thread + start
        control.when(
            place.below(words),
            lambda place=place: memory.store_shared(program.place("sums") + place * 4, Word(0)),
        )
    control.meet(0, ALL_THREADS)

    def compute() -> None:
        control.more_registers(COMPUTE_REGISTERS)
        _compute(program)

    def copy() -> None:
        control.fewer_registers(COPY_REGISTERS)
        control.when(warp.equals(WARPS), lambda: copy_weights(program))

    control.either(warp.below(WARPS), compute, copy)


SOURCES = {
    "project": ("h", "attention_gain"),
    "close": ("attended", "sub_gain"),
    "widen": ("h", "mlp_gain"),
    "narrow": ("middle", "mlp_sub_gain"),
}
"""Of the products of a phase: a vector and the gain of its norm."""


def _compute(program: Program) -> None:
    """All phases of all layers."""

    def layer(index: Word, passed: Word) -> Sequence[Word]:
        passed = _products(program, "project", index, passed)
        attention.attend(program, index)
        for name in ("close", "widen", "narrow"):
            passed = _products(program, name, index, passed)
        return [passed]

    control.loop(program.plan.layers, [Word(0)], layer)


def _products(program: Program, name: str, layer: Word, passed: Word) -> Word:
    """Products of one vector, and what becomes of them.

    ``passed`` are slots of the team before that; what is returned, after it.
    """
    plan, phase = program.plan, program.plan.phases[name]
    start, count = program.units(phase)
    # Teams have the tiles in turn.
    tiles = (count * phase.each + (TEAMS - 1) - program.order(phase)) // TEAMS

    def run() -> None:
        scales = [
            memory.load(program.at[f"{matrix}_scale"].plus(layer, 4)).bits_as_float()
            for matrix in phase.matrices
        ]
        quantise(program, SOURCES[name], phase.k, layer, partial(_ready, program, name, layer))
        outputs = Outputs(program, name, layer, scales, start, count)
        before = outputs.before()
        control.loop(tiles, [], partial(products.tile, program, phase, passed))
        control.meet(1, THREADS)
        outputs.finish(before)
        program.say_sent(name)

    if phase.units < plan.programs:
        control.when(Word(0).below(count), run)
    else:
        run()
    return passed + tiles * len(phase.chunks)


def _ready(program: Program, name: str, layer: Word) -> Word:
    """Waits for what a phase needs, and gives the tag of it."""
    before = PHASES[PHASES.index(name) - 1]
    program.wait(before, layer if name == "project" else layer + 1)
    return program.tag(SOURCES[name][0], layer, after="close" if name == "widen" else "")
