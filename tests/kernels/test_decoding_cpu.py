"""A step through all layers in one call on CPU: float64, and its steps one by one."""

import json
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import Packing, pack, unpack
from fabric_kernels.decoding import LayerStacks, decode_layers, why_not
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.test_cpu_implementation import output, start
from tests.kernels.test_decoding import L, problem, step_by_step

pytestmark = pytest.mark.usefixtures("cpu_kernels")

Case = tuple[tuple[int, int, int, int, int], Any, dict[str, Any]]
CASES: list[Case] = [
    ((96, 6, 2, 16, 160), "relu2", {"sub_norms": True, "rows": 2, "stored": "int8"}),
    ((64, 4, 4, 16, 96), "silu", {"stored": "bfloat16"}),
    ((528, 4, 1, 32, 560), "relu2", {"rows": 4}),
    ((2048, 32, 32, 64, 3584), "silu", {"sub_norms": True}),
]


def repacked(stacks: LayerStacks, packing: Packing) -> LayerStacks:
    """The same codes in another layout."""
    matrices = {
        name: replace(w, packed=pack(unpack(w.packed, w.k, w.packing), packing), packing=packing)
        for name, w in stacks.matrices.items()
    }
    return replace(stacks, **matrices)


def whole(h: jax.Array, stacks: LayerStacks, *rest: Any) -> Any:
    step = partial(decode_layers, angles=rest[2], implementation="cpu")
    return jax.jit(step)(h, stacks, *rest[:2])


def assert_equal_bits(case: Case, packing: Packing) -> None:
    dims, activation, options = case
    h, stacks, *rest = problem(dims, activation, **options)
    stacks = repacked(stacks, packing)
    found = whole(h, stacks, *rest)
    expected = jax.jit(partial(step_by_step, implementation="cpu"))(h, stacks, *rest)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("packing", ["ternary2", "ternary1.6"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_has_the_bits_of_its_steps(case: Case, packing: Packing) -> None:
    assert_equal_bits(case, packing)


@settings(max_examples=8, deadline=None)
@given(
    hidden=st.integers(1, 40).map(lambda n: 4 * n),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    width=st.integers(1, 12).map(lambda n: 4 * n),
    ffn=st.integers(1, 60).map(lambda n: 4 * n),
    rows=st.integers(1, 4),
    sub_norms=st.booleans(),
    activation=st.sampled_from(["silu", "relu2"]),
    stored=st.sampled_from(["float32", "bfloat16", "int8"]),
    packing=st.sampled_from(["ternary2", "ternary1.6"]),
)
def test_has_the_bits_of_its_steps_in_all_sizes(
    hidden: int,
    kv_heads: int,
    group: int,
    width: int,
    ffn: int,
    rows: int,
    sub_norms: bool,
    activation: Any,
    stored: str,
    packing: Packing,
) -> None:
    dims = (hidden, kv_heads * group, kv_heads, width, ffn)
    options = {"rows": rows, "sub_norms": sub_norms, "stored": stored}
    assert_equal_bits((dims, activation, options), packing)


def _norm(x: np.ndarray, gain: Any, eps: float) -> np.ndarray:
    if gain is None:
        return x
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * np.asarray(gain, np.float64)


class Oracle:
    """The step in float64, from the definitions; products quantise their inputs as BitNet does."""

    def __init__(self, stacks: LayerStacks, rounding: np.random.Generator) -> None:
        """``rounding`` moves values by a millionth: codes at a tie may fall either way."""
        self.stacks, self.rounding = stacks, rounding

    def linear(self, name: str, layer: int, x: np.ndarray) -> np.ndarray:
        weight = self.stacks.matrices[name]
        codes = np.asarray(unpack(weight.packed[layer], weight.k, weight.packing), np.float64)
        top = np.maximum(np.abs(x).max(axis=-1, keepdims=True), 1e-5)
        moved = x * (1 + 1e-6 * self.rounding.uniform(-1, 1, x.shape))
        digits = np.clip(np.rint(moved * (127 / top)), -128, 127)
        return digits @ codes.T * (top / 127) * float(weight.scale[layer])

    def attend(
        self, layer: int, qkv: list[np.ndarray], cache: Any, positions: Any, angles: Any
    ) -> Any:
        cos, sin = (np.asarray(a, np.float64)[:, 0, None] for a in angles)
        keys, values = (np.asarray(x, np.float64)[layer] for x in (cache.keys, cache.values))
        width = keys.shape[-1]
        rows = len(qkv[0])
        q, k, v = (x.reshape(rows, -1, width) for x in qkv)

        def turn(x: np.ndarray) -> np.ndarray:
            a, b = np.split(x, 2, axis=-1)
            return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

        q, k = turn(q), turn(k)
        out = np.zeros_like(q)
        for row, position in enumerate(np.asarray(positions)[:, 0]):
            for head in range(q.shape[1]):
                shared = head * keys.shape[1] // q.shape[1]
                own_keys = np.vstack([keys[row, shared, :position], k[row, shared]])
                own_values = np.vstack([values[row, shared, :position], v[row, shared]])
                scores = own_keys @ q[row, head] * width**-0.5
                weights = np.exp(scores - scores.max())
                out[row, head] = weights / weights.sum() @ own_values
        return out.reshape(rows, -1), k

    def step(self, h: np.ndarray, cache: Any, positions: Any, angles: Any) -> Any:
        s, keys = self.stacks, []
        for i in range(L):

            def gain(gains: Any, i: int = i) -> Any:
                return None if gains is None else gains[i]

            x = _norm(h, gain(s.attention_gain), s.eps)
            qkv = [self.linear(name, i, x) for name in "qkv"]
            attended, key = self.attend(i, qkv, cache, positions, angles)
            keys.append(key)
            h = h + self.linear("o", i, _norm(attended, gain(s.sub_gain), s.eps))
            x = _norm(h, gain(s.mlp_gain), s.eps)
            gate, up = self.linear("gate", i, x), self.linear("up", i, x)
            act = gate / (1 + np.exp(-gate)) if s.activation == "silu" else np.maximum(gate, 0) ** 2
            h = h + self.linear("down", i, _norm(act * up, gain(s.mlp_sub_gain), s.eps))
        return h, np.stack(keys)


@pytest.mark.parametrize("packing", ["ternary2", "ternary1.6"])
@pytest.mark.parametrize(
    "case",
    [
        ((64, 4, 2, 16, 96), "silu", {"rows": 2}),
        ((768, 12, 12, 64, 3072), "relu2", {"sub_norms": True}),
    ],
    ids=str,
)
def test_is_what_float64_says(case: Case, packing: Packing) -> None:
    """Within what a few codes at a tie may move: two oracles that round apart differ as much."""
    dims, activation, options = case
    h, stacks, cache, positions, angles = problem(dims, activation, **options)
    found, new = whole(h, repacked(stacks, packing), cache, positions, angles)
    start = np.asarray(h, np.float64)[:, 0]
    one, two = (
        Oracle(stacks, np.random.default_rng(seed)).step(start, cache, positions, angles)
        for seed in (1, 2)
    )
    size = np.abs(one[0]).max()
    bound = 4 * np.abs(one[0] - two[0]).max() + 1e-4 * size
    assert bound < 0.05 * size
    np.testing.assert_allclose(np.asarray(found)[:, 0], one[0], atol=bound)
    row = np.arange(len(start))
    stored = np.asarray(new.keys)[:, row, :, np.asarray(positions)[:, 0]].swapaxes(0, 1)
    bound = 4 * np.abs(one[1] - two[1]).max() + 1e-4 * np.abs(one[1]).max()
    np.testing.assert_allclose(stored, one[1], atol=bound)


def test_results_do_not_depend_on_threads() -> None:
    """Pools of 1, 2 and 8 threads, all at once, each called by three threads at once."""
    running = [start("decoding_threads", NPROC=str(count)) for count in (1, 2, 8)]
    digests = [json.loads(output(process)) for process in running]
    assert len(digests[0]) == 1
    assert digests[1:] == digests[:1] * 2


def test_says_what_it_does_not_take() -> None:
    h, stacks, cache, positions, angles = problem((64, 4, 4, 16, 96), "silu")
    assert why_not(stacks, cache, 1, "cpu") is None
    mixed = replace(stacks, q=repacked(stacks, "ternary1.6").q)
    assert why_not(mixed, cache, 1, "cpu") == "weights are packed in more than one way"
    assert why_not(stacks, cache, 5, "cpu") == "5 rows are more than 4"
    half = replace(stacks, attention_gain=stacks.attention_gain.astype(jnp.bfloat16))
    assert why_not(half, cache, 1, "cpu") == "on CPU it is for float32"
    other = replace(cache, keys=cache.keys.astype(jnp.float16))
    assert why_not(stacks, other, 1, "cpu") == "a cache of float16"
    with pytest.raises(ValueError, match="on CPU it is for float32"):
        whole(h.astype(jnp.bfloat16), stacks, cache, positions, angles)


@pytest.mark.parametrize("change", ["gain", "matrix", "angles"])
def test_shapes_that_do_not_fit_are_an_error(change: str) -> None:
    h, stacks, cache, positions, angles = problem((64, 4, 4, 16, 96), "silu")
    if change == "gain":
        stacks = replace(stacks, mlp_gain=stacks.mlp_gain[:, :-1])
    elif change == "matrix":
        stacks = replace(stacks, up=replace(stacks.up, packed=stacks.up.packed[:, :-1]))
    else:
        angles = (angles[0][..., :-1], angles[1])
    with pytest.raises(jax.errors.JaxRuntimeError, match="a step of decoding"):
        jax.block_until_ready(whole(h, stacks, cache, positions, angles))
