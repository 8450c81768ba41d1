"""The Pallas-Triton kernel of a step of decoding through all layers.

Five phases a layer, with a barrier of all programs before each: q, k and v; attention; o; gate and
up; down. A program has every G-th tile of rows of a matrix. It asks for its first weights before it
waits, then makes the codes of the tokens, all by itself: that costs less than another barrier.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from fabric_kernels.attention.cache import KVCache
from fabric_kernels.attention.triton_cached import (
    LOG2_E,
    DecodingStep,
    attend_and_store,
    mean_values,
    write_halves,
)
from fabric_kernels.decoding.grid_barrier import arrive, wait
from fabric_kernels.decoding.stacks import LayerStacks
from fabric_kernels.norm import Gate
from fabric_kernels.ternary_matmul.triton_few_tokens import (
    Codes,
    codes_of_floats,
    gated,
    load_planes,
    product_of_row,
)
from fabric_kernels.ternary_matmul.triton_kernels import Tile, scale_at
from fabric_kernels.triton_call import Mode

Ref = Any
PHASES = 5
WARPS = 8
THREAD_BYTES = 128
"""Of weights in a tile at most."""
MOST_TILE_ROWS = 16
DEPTH = 1
"""Tiles of a matrix on their way while one is multiplied."""
ATTENTION_ELEMENTS = 16384
"""Of keys at a time: a program of this launch has more threads than one of attention alone."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a program knows.

    Attributes:
        at: the arrays by name; ``h``, ``counter`` and the cache are read and written in place.
        stored: the cache's.
        rows: B.
        heads: H.
        kv_heads: K.
        activation: of the gate.
        eps: of the norms.
        factor: on scores, for powers of two.
        programs: G.
        program: which of them this is.
        mode: what runs it.
    """

    at: dict[str, Ref]
    stored: Sequence[Ref]
    rows: int
    heads: int
    kv_heads: int
    activation: Gate
    eps: float
    factor: float
    programs: int
    program: jax.Array
    mode: Mode


def decode_layers(
    h: jax.Array,
    stacks: LayerStacks,
    cache: KVCache,
    positions: jax.Array,
    angles: tuple[jax.Array, jax.Array],
    scale: float,
    *,
    programs: int,
    mode: Mode,
) -> tuple[jax.Array, KVCache]:
    """As :func:`fabric_kernels.decoding.decode_layers`, what is given checked.

    ``programs`` must all be able to run at the same time.
    """
    stored = cache.arrays
    inputs = _inputs(stacks, positions, angles)
    in_place = {"h": h.reshape(len(h), -1), "counter": jnp.zeros(1, jnp.int32)}
    in_place |= {f"cache{i}": array for i, array in enumerate(stored)}
    between = _between(stacks, cache, len(h), h.dtype)
    between["seen"] = jax.ShapeDtypeStruct((programs,), jnp.int32)
    step = partial(
        Step,
        rows=len(h),
        heads=stacks.heads,
        kv_heads=stacks.kv_heads,
        activation=stacks.activation,
        eps=stacks.eps,
        factor=scale * LOG2_E,
        programs=programs,
        mode=mode,
    )
    same = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in in_place.values()]
    outputs = pl.pallas_call(
        partial(_program, inputs=list(inputs), outputs=[*in_place, *between], make=step),
        out_shape=[*same, *between.values()],
        grid=(programs,),
        input_output_aliases={len(inputs) + i: i for i in range(len(in_place))},
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=mode == "interpret",
        name="decode_layers",
    )(*inputs.values(), *in_place.values())
    found = dict(zip([*in_place, *between], outputs, strict=True))
    new = replace(cache, keys=found["cache0"], values=found["cache1"])
    if len(stored) > 2:
        new = replace(new, key_scales=found["cache2"], value_scales=found["cache3"])
    return found["h"].reshape(h.shape), new


def _inputs(
    stacks: LayerStacks, positions: jax.Array, angles: tuple[jax.Array, jax.Array]
) -> dict[str, jax.Array]:
    """What is only read."""
    matrices = stacks.matrices.items()
    return {
        "positions": positions,
        "cos": angles[0],
        "sin": angles[1],
        **stacks.gains,
        **{f"{name}_packed": matrix.packed for name, matrix in matrices},
        **{f"{name}_scale": matrix.scale for name, matrix in matrices},
    }


def _between(
    stacks: LayerStacks, cache: KVCache, rows: int, dtype: Any
) -> dict[str, jax.ShapeDtypeStruct]:
    """What phases hand to the next."""
    widths = {
        **{name: stacks.matrices[name].n for name in ("q", "k", "v")},
        "attended": stacks.heads * cache.keys.shape[-1],
        "middle": stacks.gate.n,
    }
    return {name: jax.ShapeDtypeStruct((rows, n), dtype) for name, n in widths.items()}


def _program(*refs: Ref, inputs: list[str], outputs: list[str], make: Callable[..., Step]) -> None:
    # Of what is in place, the references of the results are read too.
    results = refs[len(refs) - len(outputs) :]
    at = dict(zip(inputs, refs, strict=False)) | dict(zip(outputs, results, strict=True))
    stored = [at[name] for name in outputs if name.startswith("cache")]
    step = make(at=at, stored=stored, program=pl.program_id(0))

    def layer(index: jax.Array, seen: jax.Array) -> jax.Array:
        for number, phase in enumerate((_project, _attend, _close, _widen, _narrow)):
            arrivals = (index * PHASES + number) * step.programs
            waited = partial(wait, at["counter"], arrivals, 32 * WARPS, step.mode)
            seen = jnp.maximum(seen, phase(step, index, waited))
            arrive(at["counter"], step.mode)
        return seen

    at["seen"][step.program] = lax.fori_loop(0, at["q_packed"].shape[0], layer, jnp.int32(0))


# ---- phases: each calls ``ready`` before it reads what others have written, and returns what that
# gives --------------------------------------------------------------------------------------------


def _project(step: Step, layer: jax.Array, ready: Callable[[], jax.Array]) -> jax.Array:
    """q, k and v of the normalised residual stream."""
    names = ("q", "k", "v")
    return _products(step, layer, ready, names, ("h", "attention_gain"), names)


def _close(step: Step, layer: jax.Array, ready: Callable[[], jax.Array]) -> jax.Array:
    """The residual stream plus o."""
    return _products(step, layer, ready, ("o",), ("attended", "sub_gain"), ("h",), add=True)


def _narrow(step: Step, layer: jax.Array, ready: Callable[[], jax.Array]) -> jax.Array:
    """The residual stream plus down."""
    return _products(step, layer, ready, ("down",), ("middle", "mlp_sub_gain"), ("h",), add=True)


def _attend(step: Step, layer: jax.Array, ready: Callable[[], jax.Array]) -> jax.Array:
    """Each query head of each row by a program."""
    at, width = step.at, step.stored[0].shape[4]
    slots = step.stored[0].shape[3]
    seen = ready()

    def head(turn: jax.Array, _: jax.Array) -> jax.Array:
        item = step.program + turn * step.programs
        row = item // step.heads
        query = item - row * step.heads
        one = DecodingStep(
            q=lambda head: (at["q"], (row, head * width)),
            k=lambda head: (at["k"], (row, head * width)),
            v=lambda head: (at["v"], (row, head * width)),
            turn=(at["cos"], at["sin"]),
            stored=step.stored,
            new=step.stored,
            shared=step.heads // step.kv_heads,
            factor=step.factor,
            tile_elements=ATTENTION_ELEMENTS,
        )
        bounds = (at["positions"][row, 0], jnp.int32(0), jnp.int32(slots))
        (sums,) = attend_and_store(one, (layer, row, query), 1, bounds, True, step.mode)
        write_halves(at["attended"], (row, query * width), mean_values(sums), width)
        return turn

    count = _turns(step, step.program, step.rows * step.heads)
    lax.fori_loop(0, count, head, jnp.int32(0))
    return seen


def _widen(step: Step, layer: jax.Array, ready: Callable[[], jax.Array]) -> jax.Array:
    """The gated product of gate and up, whose equal rows a program has together."""
    at, n = step.at, step.at["gate_packed"].shape[1]
    tile = _tile(step, "gate", each=2)
    start = step.program

    def load(turn: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        number = start + turn * step.programs
        gate, up = (_load(at[f"{name}_packed"], layer, number, tile) for name in ("gate", "up"))
        return gate, up

    ahead = [load(turn) for turn in range(DEPTH)]
    codes, seen = _codes(step, layer, ("h", "mlp_gain"), tile, ready)
    scales = [scale_at(at[f"{name}_scale"], layer) for name in ("gate", "up")]

    def body(
        turn: jax.Array, ahead: list[tuple[jax.Array, jax.Array]]
    ) -> list[tuple[jax.Array, jax.Array]]:
        following = load(turn + DEPTH)
        outputs = (start + turn * step.programs) * tile.n + lax.iota(jnp.int32, tile.n)
        for t, own in enumerate(codes):
            gate, up = (
                product_of_row(bytes_, own, scale, at["middle"].dtype, tile, step.mode)
                for bytes_, scale in zip(ahead[0], scales, strict=True)
            )
            y = gated(gate, up, step.activation)
            plgpu.store(at["middle"].at[t, outputs], y, mask=outputs < n)
        return [*ahead[1:], following]

    lax.fori_loop(0, _turns(step, start, pl.cdiv(n, tile.n)), body, ahead)
    return seen


# ---- products -----------------------------------------------------------------------------------


def _products(
    step: Step,
    layer: jax.Array,
    ready: Callable[[], jax.Array],
    names: Sequence[str],
    source: tuple[str, str],
    targets: Sequence[str],
    *,
    add: bool = False,
) -> jax.Array:
    """Products of some matrices with what they share, stored in, or added to, other arrays."""
    at = step.at
    tiles = [_tile(step, name) for name in names]
    counts = [
        pl.cdiv(at[f"{name}_packed"].shape[1], tile.n)
        for name, tile in zip(names, tiles, strict=True)
    ]
    # A program's turn comes in all tiles of all matrices, one after another.
    starts = [
        lax.rem(step.program + (-sum(counts[:i]) % step.programs), jnp.int32(step.programs))
        for i in range(len(names))
    ]
    loads = [
        partial(_load_turn, step, at[f"{name}_packed"], layer, start, tile)
        for name, start, tile in zip(names, starts, tiles, strict=True)
    ]
    first = [[load(turn) for turn in range(DEPTH)] for load in loads]
    codes, seen = _codes(step, layer, source, tiles[0], ready)
    for i, (name, tile, target) in enumerate(zip(names, tiles, targets, strict=True)):
        scale, out = scale_at(at[f"{name}_scale"], layer), at[target]
        body = partial(_tile_of_products, step, (loads[i], starts[i], tile), codes, scale, out, add)
        lax.fori_loop(0, _turns(step, starts[i], counts[i]), body, first[i])
    return seen


def _tile_of_products(
    step: Step,
    source: tuple[Callable[[jax.Array], jax.Array], jax.Array, Tile],
    codes: list[Codes],
    scale: jax.Array,
    out: Ref,
    add: bool,
    turn: jax.Array,
    ahead: list[jax.Array],
) -> list[jax.Array]:
    """The first of the tiles that are ahead is multiplied, one more is asked for."""
    load, start, tile = source
    following = load(turn + DEPTH)
    outputs = (start + turn * step.programs) * tile.n + lax.iota(jnp.int32, tile.n)
    mask = outputs < out.shape[1]
    for t, row in enumerate(codes):
        y = product_of_row(ahead[0], row, scale, out.dtype, tile, step.mode)
        where = out.at[t, outputs]
        if add:
            none = jnp.zeros((), out.dtype)
            y = y + plgpu.load(where, mask=mask, other=none, volatile=True)
        plgpu.store(where, y, mask=mask)
    return [*ahead[1:], following]


def _load_turn(
    step: Step, packed: Ref, layer: jax.Array, start: jax.Array, tile: Tile, turn: jax.Array | int
) -> jax.Array:
    return _load(packed, layer, start + turn * step.programs, tile)


def _turns(step: Step, start: jax.Array, count: int) -> jax.Array:
    """How many of ``count`` things a program has that begins with ``start``."""
    return (count - start + step.programs - 1) // step.programs


def _codes(
    step: Step,
    layer: jax.Array,
    source: tuple[str, str],
    tile: Tile,
    ready: Callable[[], jax.Array],
) -> tuple[list[Codes], jax.Array]:
    """All tokens of an array, normalised where there is a gain, quantised, once it is ready."""
    x, gain = step.at[source[0]], step.at.get(source[1])
    columns = lax.iota(jnp.int32, tile.w)
    gains = None if gain is None else load_planes(gain, layer, columns)
    seen = ready()
    codes = [
        codes_of_floats(
            load_planes(x, t, columns, volatile=True), gains, x.shape[1], step.eps, step.mode
        )
        for t in range(step.rows)
    ]
    return codes, seen


def _load(packed: Ref, layer: jax.Array, number: jax.Array, tile: Tile) -> jax.Array:
    """A tile of rows, [tile.n, tile.w]; zeros beyond the matrix."""
    _, n, width = packed.shape
    shape = (tile.n, tile.w)
    rows = number * tile.n + lax.broadcasted_iota(jnp.int32, shape, 0)
    columns = lax.broadcasted_iota(jnp.int32, shape, 1)
    mask = (rows < n) & (columns < width) if width != tile.w else rows < n
    return plgpu.load(packed.at[layer, rows, columns], mask=mask, other=jnp.uint8(0))


def _tile(step: Step, name: str, each: int = 1) -> Tile:
    """As many rows as keep every program about equally busy.

    ``each`` is how many tiles a program has at a time.
    """
    _, n, width = step.at[f"{name}_packed"].shape
    w = max(128, 1 << (width - 1).bit_length())
    most = max(4, min(MOST_TILE_ROWS, THREAD_BYTES * 32 * WARPS // (w * each)))
    # By the rows of the busiest program. Low tiles are slow: a token is read for each.
    longest = {
        rows: pl.cdiv(pl.cdiv(n, rows), step.programs) * rows for rows in (4, 8, 16) if rows <= most
    }
    good = [rows for rows, count in longest.items() if count <= 1.1 * min(longest.values())]
    return Tile(m=1, n=max(good), w=w, warps=WARPS, stages=1)
