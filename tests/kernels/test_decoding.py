"""A step through all layers in one launch, interpreted, against its steps one by one."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import KVCache, TernaryWeight, cached_attention, empty_cache, ternary_linear
from fabric_kernels.decoding import LayerStacks, decode_layers, why_not
from fabric_kernels.ternary_matmul import Implementation, Prologue
from fabric_kernels.triton_call import without_deprecation
from jax.interpreters import partial_eval

from tests.kernels.conftest import need_hopper
from tests.kernels.test_triton_kernel import lowered

L, S = 2, 24


def problem(
    dims: tuple[int, int, int, int, int],
    activation: Any,
    *,
    rows: int = 1,
    sub_norms: bool = False,
    dtype: str = "float32",
    stored: str = "float32",
) -> tuple[jax.Array, LayerStacks, KVCache, jax.Array, Any]:
    hidden, heads, kv_heads, width, ffn = dims
    rng = np.random.default_rng(hidden)

    def floats(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    def matrix(n: int, k: int) -> TernaryWeight:
        # No byte has a field of three: codes are 0 to 2.
        fields = rng.integers(0, 3, (L, n, k // 4, 4), dtype=np.uint8)
        packed = np.sum(fields << np.arange(0, 8, 2, dtype=np.uint8), axis=-1, dtype=np.uint8)
        scale = jnp.asarray(rng.uniform(0.5, 2, L) / np.sqrt(k), jnp.float32)
        return TernaryWeight(jnp.asarray(packed), scale, jnp.int32(0), k)

    own, shared = heads * width, kv_heads * width
    stacks = LayerStacks(
        q=matrix(own, hidden),
        k=matrix(shared, hidden),
        v=matrix(shared, hidden),
        o=matrix(hidden, own),
        gate=matrix(ffn, hidden),
        up=matrix(ffn, hidden),
        down=matrix(hidden, ffn),
        attention_gain=1 + 0.1 * floats(L, hidden),
        sub_gain=1 + 0.1 * floats(L, own) if sub_norms else None,
        mlp_gain=1 + 0.1 * floats(L, hidden),
        mlp_sub_gain=1 + 0.1 * floats(L, ffn) if sub_norms else None,
        activation=activation,
        eps=1e-5,
        heads=heads,
        kv_heads=kv_heads,
    )
    cache = empty_cache(L, rows, S, kv_heads, width, stored)
    every = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32)[None], (rows, S))
    for layer in range(L):
        keys, values = (floats(rows, S, kv_heads, width) for _ in range(2))
        cache = cache.write(jnp.int32(layer), every, keys, values)
    positions = jnp.asarray(rng.integers(1, S, (rows, 1)), jnp.int32)
    angle = floats(rows, 1, width // 2).astype(jnp.float32)
    return floats(rows, 1, hidden), stacks, cache, positions, (jnp.cos(angle), jnp.sin(angle))


def step_by_step(
    h: jax.Array,
    stacks: LayerStacks,
    cache: KVCache,
    positions: jax.Array,
    angles: Any,
    implementation: Implementation,
) -> tuple[jax.Array, KVCache]:
    batch, width = h.shape[0], cache.keys.shape[-1]
    for i in range(L):
        layer = jnp.int32(i)
        own = {name: replace(w, layer=layer) for name, w in stacks.matrices.items()}
        run = partial(ternary_linear, implementation=implementation)

        def gain(stack: jax.Array | None, layer: int = i, **more: Any) -> Prologue:
            return Prologue(gain=None if stack is None else stack[layer], eps=stacks.eps, **more)

        qkv = run(h, [own[name] for name in "qkv"], prologue=gain(stacks.attention_gain))
        q, k, v = (y.reshape(batch, 1, -1, width) for y in qkv)
        attended, cache = cached_attention(
            *(q, k, v, cache, layer, positions), angles=angles, implementation=implementation
        )
        x = attended.reshape(batch, 1, -1)
        (h,) = run(x, [own["o"]], prologue=gain(stacks.sub_gain), residual=h)
        gate, up = run(h, [own["gate"], own["up"]], prologue=gain(stacks.mlp_gain))
        before = gain(stacks.mlp_sub_gain, gate=gate, activation=stacks.activation)
        (h,) = run(up, [own["down"]], prologue=before, residual=h)
    return h, cache


CASES: list[tuple[tuple[int, int, int, int, int], str, dict[str, Any]]] = [
    ((96, 6, 2, 16, 160), "relu2", {"sub_norms": True, "rows": 2, "stored": "int8"}),
]
SLOW_CASES: list[tuple[tuple[int, int, int, int, int], str, dict[str, Any]]] = [
    ((64, 4, 4, 16, 96), "silu", {"dtype": "bfloat16", "stored": "bfloat16"}),
    ((64, 4, 4, 16, 96), "silu", {}),
    ((528, 4, 1, 32, 560), "relu2", {"rows": 3}),
]
DEVICE_CASES = [
    ((768, 12, 12, 64, 3072), "silu", {}),
    ((2048, 32, 32, 64, 5632), "silu", {"rows": 2}),
    ((2560, 20, 5, 128, 6912), "relu2", {"sub_norms": True}),
    ((5120, 40, 40, 128, 13824), "silu", {"stored": "int8"}),
]


def check(case: Any) -> None:
    dims, activation, options = case
    h, stacks, cache, positions, angles = problem(dims, activation, **options)
    found, new = jax.jit(partial(decode_layers, angles=angles))(h, stacks, cache, positions)
    expected, reference = jax.jit(partial(step_by_step, implementation="triton"))(
        h, stacks, cache, positions, angles
    )
    assert found.dtype == h.dtype
    tolerance = 2e-2 if h.dtype == jnp.bfloat16 else 2e-5
    np.testing.assert_allclose(
        np.asarray(found, np.float32), np.asarray(expected, np.float32), atol=tolerance * 4
    )
    for ours, theirs in zip(jax.tree.leaves(new), jax.tree.leaves(reference), strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        atol = 1.0 if cache.key_scales is not None else tolerance
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_its_steps(case: Any) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_CASES, ids=str)
def test_equals_its_steps_in_other_sizes(case: Any) -> None:
    check(case)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("launch", ["triton", "mosaic_gpu"])
@pytest.mark.parametrize("case", DEVICE_CASES, ids=str)
def test_programs_wait_for_each_other(case: Any, launch: Any) -> None:
    """With all programs of a device; a race would show in some of the tries."""
    if launch == "mosaic_gpu":
        need_hopper()
    dims, activation, options = case
    stored = {"stored": "bfloat16"} if launch == "mosaic_gpu" else {}
    h, stacks, cache, positions, angles = problem(
        dims, activation, **{**options, **stored, "dtype": "bfloat16"}
    )
    run = jax.jit(partial(decode_layers, angles=angles, implementation=launch))
    tries = [np.asarray(run(h, stacks, cache, positions)[0], np.float32) for _ in range(40)]
    for found in tries:
        np.testing.assert_array_equal(found, tries[0])

    def distance(implementation: Implementation) -> float:
        step = jax.jit(partial(step_by_step, implementation=implementation))
        expected = np.asarray(step(h, stacks, cache, positions, angles)[0], np.float32)
        return float(np.sqrt(np.mean((tries[0] - expected) ** 2)))

    # Norms may be sums in another order than those of its steps one by one, and codes may flip: no
    # more of them than between those steps and plain jax.
    assert distance("triton") <= distance("xla")


def test_loops_that_wait_are_in_the_program() -> None:
    """What only reads and is not asked for would be left out before any compiler sees it."""
    h, stacks, cache, positions, angles = problem((64, 4, 2, 16, 96), "silu")
    with without_deprecation():
        from fabric_kernels.decoding import triton_layers
    traced = jax.make_jaxpr(
        lambda *arrays: triton_layers.decode_layers(*arrays, angles, 1.0, programs=132, mode="cuda")
    )(h, stacks, cache, positions)
    (call,) = [e for e in traced.jaxpr.eqns if e.primitive.name == "pallas_call"]
    kernel = call.params["jaxpr"]
    kernel, _ = partial_eval.dce_jaxpr(kernel, [True] * len(kernel.outvars))
    (layers,) = [e for e in kernel.eqns if e.primitive.name in ("while", "scan")]
    body = layers.params.get("body_jaxpr", layers.params.get("jaxpr")).jaxpr
    loops = [e for e in body.eqns if e.primitive.name == "while"]
    waits = [e for e in loops if "max" in str(e.params["body_jaxpr"])]
    assert len(waits) >= triton_layers.PHASES


def test_lowers_to_one_launch_in_place() -> None:
    h, stacks, cache, positions, angles = problem(
        (64, 4, 2, 16, 96), "silu", dtype="bfloat16", stored="bfloat16"
    )

    def run(*arrays: Any) -> Any:
        *own, angles = arrays
        return decode_layers(*own, angles=angles)

    text = lowered(run, h, stacks, cache, positions, angles, platform="cuda")
    assert text.count("xla.gpu.triton") == 1
    assert text.count("output_operand_alias<") == 2 + len(jax.tree.leaves(cache))


def test_says_what_it_does_not_take() -> None:
    h, stacks, cache, positions, angles = problem((64, 4, 2, 16, 96), "silu")
    assert why_not(stacks, cache, 1) is None
    assert "rows" in str(why_not(stacks, cache, 5))
    thin = replace(stacks, q=replace(stacks.q, packing="ternary1.6"))
    with pytest.raises(ValueError, match="ternary2"):
        decode_layers(h, thin, cache, positions, angles=angles)
    long = empty_cache(L, 1, 4096, 2, 16, "float32")
    assert "slots" in str(why_not(stacks, long, 1))
