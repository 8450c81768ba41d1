"""The Hopper kernel of a step through all layers, carried out without a GPU."""

from functools import partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fabric_kernels import KVCache, TernaryWeight, empty_cache, unpack
from fabric_kernels.decoding import LayerStacks, api, decode_layers, fastest, why_not
from fabric_kernels.decoding.hopper import layers, memory
from fabric_kernels.decoding.hopper import plan as plans
from fabric_kernels.decoding.hopper.program import Program
from fabric_kernels.decoding.hopper.values import Address, Word
from hypothesis import given
from hypothesis import strategies as st
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import func

from fabric_jax.models.registry import REGISTRY
from tests.kernels.simt.machine import Machine
from tests.kernels.simt.mlir import operations_of
from tests.kernels.test_decoding import problem
from tests.kernels.test_triton_kernel import lowered

PROGRAMS = 3


def carried_out(
    h: jax.Array, stacks: LayerStacks, cache: KVCache, positions: jax.Array, angles: Any, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The residual stream, keys and values after a step of ``PROGRAMS`` programs."""
    plan = plans.make_plan(stacks, cache, len(h), PROGRAMS)
    inputs, in_place = layers.arrays(plan, h, stacks, cache, positions, angles)
    arrays = {name: np.asarray(array) for name, array in {**inputs, **in_place}.items()}
    places, end = {}, 0
    for name, array in arrays.items():
        places[name], end = end, end + -(-array.nbytes // 256) * 256
    memory = np.zeros(end, np.uint8)
    for name, array in arrays.items():
        memory[places[name] :][: array.nbytes] = np.ascontiguousarray(array).view(np.uint8).ravel()

    # Both supported versions of jax have it, not yet where users look.
    context = import_module("jax._src.interpreters.mlir").make_ir_context()
    with context, ir.Location.unknown():
        module = ir.Module.create()
        with ir.InsertionPoint(module.body):
            function = func.FuncOp("kernel", ([], []))
        with ir.InsertionPoint(function.add_entry_block()):
            program = Program(
                plan=plan,
                activation=stacks.activation,
                eps=stacks.eps,
                factor=layers.score_factor(cache.keys.shape[-1] ** -0.5),
                gain_bytes={name: gain.dtype.itemsize for name, gain in stacks.gains.items()},
                at={name: Address.at(place) for name, place in places.items()},
                shared=Word(0),
            )
            layers.run_program(program)
            func.return_([])
        operations = operations_of(function.entry_block)
    machine = Machine(memory, seed)
    machine.run(operations, PROGRAMS, layers.ALL_THREADS, plan.shared_bytes)

    def result(name: str) -> np.ndarray:
        array = arrays[name]
        return memory[places[name] :][: array.nbytes].view(array.dtype).reshape(array.shape)

    words = result("h") >> 16 << 16
    return words.view(np.float32), result("keys"), result("values")


# ---- the same step in numpy ----------------------------------------------------------------------


def half(x: Any) -> np.ndarray:
    """Rounded to bfloat16."""
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def single(x: Any) -> np.ndarray:
    """Rounded to float32."""
    return np.asarray(x, np.float32).astype(np.float64)


def product(x: np.ndarray, weight: TernaryWeight, layer: int, gain: Any, eps: float) -> np.ndarray:
    """[B, N] of [B, K]: normalised, quantised (bitnet_spec: absmax), and multiplied exactly."""
    if gain is not None:
        inverse = single(1 / np.sqrt(single(np.mean(x * x, axis=1, keepdims=True) + eps)))
        x = half(half(x * inverse) * half(np.asarray(gain[layer], np.float32)))
    largest = np.maximum(np.abs(x).max(axis=1, keepdims=True), single(1e-5))
    scale = single(single(1 / largest) * 127)
    codes = np.rint(single(x * scale)).astype(np.int64)
    weights = np.asarray(unpack(weight.packed[layer], weight.k, "ternary2"), np.int64)
    factor = single(single(1 / scale) * float(weight.scale[layer]))
    return half(single(single(codes @ weights.T) * factor))


def turned(x: np.ndarray, angles: Any) -> np.ndarray:
    """[B, heads, hd] by the rotary angles [B, 1, hd/2]."""
    cos, sin = (half(a) for a in angles)
    first, second = np.split(x, 2, axis=-1)
    parts = half(first * cos) - half(second * sin), half(second * cos) + half(first * sin)
    return half(np.concatenate(parts, axis=-1))


def in_numpy(
    h: jax.Array, stacks: LayerStacks, cache: KVCache, positions: jax.Array, angles: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As ``carried_out``, in float64, rounded where values are stored."""
    x = np.asarray(h, np.float64)[:, 0]
    keys, values = (np.array(a, np.float64) for a in (cache.keys, cache.values))
    rows, shared, width = len(x), stacks.heads // stacks.kv_heads, keys.shape[-1]
    at = {
        name: (lambda y, i, g, w=w: product(y, w, i, g, stacks.eps))
        for name, w in stacks.matrices.items()
    }
    for i in range(keys.shape[0]):
        q, k, v = (at[name](x, i, stacks.attention_gain).reshape(rows, -1, width) for name in "qkv")
        q, k = turned(q, angles), turned(k, angles)
        attended = np.zeros_like(q)
        for b in range(rows):
            position = int(positions[b, 0])
            if position < keys.shape[3]:
                keys[i, b, :, position], values[i, b, :, position] = k[b], v[b]
            for head in range(stacks.heads):
                seen = keys[i, b, head // shared, : position + 1]
                scores = seen @ q[b, head] * width**-0.5
                weights = np.exp(scores - scores.max())
                mean = weights @ values[i, b, head // shared, : position + 1] / weights.sum()
                attended[b, head] = half(mean)
        x = half(x + at["o"](attended.reshape(rows, -1), i, stacks.sub_gain))
        gate, up = (at[name](x, i, stacks.mlp_gain) for name in ("gate", "up"))
        if stacks.activation == "silu":
            gate = half(gate * half(1 / (1 + np.exp(-gate))))
        else:
            gate = half(np.maximum(gate, 0) ** 2)
        x = half(x + at["down"](half(gate * up), i, stacks.mlp_sub_gain))
    return x, keys, values


Case = tuple[tuple[int, int, int, int, int], Any, dict[str, Any]]
CASES: list[Case] = [
    ((256, 4, 2, 64, 512), "silu", {}),
    ((256, 8, 4, 32, 768), "relu2", {"sub_norms": True, "rows": 3}),
]
SLOW_CASES: list[Case] = [
    # Lanes without channels; heads as wide as a warp; three pieces a thread, several chunks a row.
    ((768, 8, 2, 96, 256), "silu", {"rows": 2}),
    ((256, 1, 1, 256, 512), "relu2", {"rows": 4}),
    ((256, 4, 4, 64, 8448), "silu", {"sub_norms": True}),
]


def arguments_of(case: Case) -> tuple[jax.Array, LayerStacks, KVCache, jax.Array, Any]:
    dims, activation, options = case
    return problem(dims, activation, **options, dtype="bfloat16", stored="bfloat16")


def share_that_differs(found: Any, expected: Any) -> float:
    """Of elements; attention's float32 may round to another bfloat16, from which codes may flip."""
    return max(
        float(np.mean(np.asarray(ours, np.float64) != theirs))
        for ours, theirs in zip(found, expected, strict=True)
    )


def check(case: Case) -> None:
    arguments = arguments_of(case)
    assert plans.why_not(arguments[1], arguments[2]) is None
    found = carried_out(*arguments, seed=1)
    assert share_that_differs(found, in_numpy(*arguments)) < 0.01


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_numpy(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_CASES, ids=str)
def test_equals_numpy_in_other_sizes(case: Case) -> None:
    check(case)


@pytest.mark.slow
def test_a_position_beyond_the_cache() -> None:
    """It is not stored, and sees every slot."""
    h, stacks, cache, positions, angles = arguments_of(CASES[0])
    arguments = (h, stacks, cache, jnp.full_like(positions, cache.capacity), angles)
    found = carried_out(*arguments, seed=2)
    assert share_that_differs(found, in_numpy(*arguments)) < 0.01
    np.testing.assert_array_equal(found[1], cache.keys)


def test_without_tags_it_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent is seen late here, and in any order: the counters alone are not enough."""
    monkeypatch.setattr(memory, "TAG_BITS", 0)
    arguments = arguments_of(CASES[0])
    found = carried_out(*arguments, seed=1)
    assert share_that_differs(found, in_numpy(*arguments)) > 0.1


# ---- how work is divided -------------------------------------------------------------------------


@given(
    st.integers(1, 4),
    st.integers(1, 8),
    st.sampled_from([(16, 8, 32), (4, 4, 64), (8, 2, 96), (6, 3, 128), (20, 5, 128)]),
    st.integers(1, 60),
    st.integers(1, 140),
)
def test_every_unit_is_one_programs(
    rows: int, hidden: int, heads: tuple[int, int, int], ffn: int, programs: int
) -> None:
    number, shared, width = heads
    plan = plans.Plan(
        rows=rows,
        layers=2,
        hidden=256 * hidden,
        ffn=256 * ffn,
        heads=number,
        kv_heads=shared,
        width=width,
        slots=64,
        programs=programs,
    )
    for phase in plan.phases.values():
        firsts = [(p + programs - phase.offset) % programs for p in range(programs)]
        units = sorted(u for first in firsts for u in range(first, phase.units, programs))
        assert units == list(range(phase.units))
        assert sum(phase.chunks) * plans.BLOCK_CODES == phase.k
        busiest = max(len(range(first, phase.units, programs)) for first in firsts)
        assert busiest * phase.each == phase.most_tiles(programs)
    assert plan.row_stride % plans.BANKS == plans.BLOCK_BYTES
    assert plan.row_stride >= plans.BLOCK_BYTES * max(
        count for phase in plan.phases.values() for count in phase.chunks
    )


@pytest.mark.parametrize("name", [name for name, one in REGISTRY.items() if one.ternary])
def test_published_sizes_fit_into_shared_memory(name: str) -> None:
    config = REGISTRY[name]
    own, shared = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    if any(k % plans.BLOCK_CODES for k in (config.hidden_size, config.ffn_size, own)):
        return
    plan = plans.Plan(
        rows=4,
        layers=config.num_layers,
        hidden=config.hidden_size,
        ffn=config.ffn_size,
        heads=config.num_heads,
        kv_heads=shared // config.head_dim,
        width=config.head_dim,
        slots=2048,
        programs=132,
    )
    assert plan.ring_slots >= 4
    assert plan.shared_bytes <= 227 << 10


# ---- the program ---------------------------------------------------------------------------------


def test_lowers_to_one_launch_in_place() -> None:
    h, stacks, cache, positions, angles = arguments_of(CASES[0])

    def run(*arrays: Any) -> Any:
        return decode_layers(*arrays, angles=angles, implementation="mosaic_gpu")

    text = lowered(run, h, stacks, cache, positions, platform="cuda")
    assert text.count("@mosaic_gpu_v2") == 1
    # What is exchanged, its counters, the stream, keys and values.
    assert text.count("output_operand_alias<") == 5


def test_says_what_it_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    h, stacks, cache, positions, angles = arguments_of(CASES[0])
    reason = partial(why_not, rows=1, implementation="mosaic_gpu")
    assert reason(stacks, cache) is None
    narrow = problem((64, 4, 2, 16, 96), "silu", dtype="bfloat16", stored="bfloat16")
    assert "16 x 256" in str(reason(narrow[1], narrow[2]))
    assert "int8" in str(reason(stacks, empty_cache(2, 1, 24, 2, 64, "int8")))
    assert "24 wide" in str(reason(stacks, empty_cache(2, 1, 24, 2, 24, "bfloat16")))
    with pytest.raises(ValueError, match="float32"):
        decode_layers(
            *(h.astype(jnp.float32), stacks, cache, positions),
            angles=angles,
            implementation="mosaic_gpu",
        )
    assert fastest(stacks, cache, 1, "bfloat16") == "triton"
    monkeypatch.setattr(api, "compute_capability", lambda: api.HOPPER)
    assert fastest(stacks, cache, 1, "bfloat16") == "mosaic_gpu"
    assert fastest(stacks, cache, 1, "float32") == "triton"
    assert fastest(narrow[1], narrow[2], 1, "bfloat16") == "triton"
