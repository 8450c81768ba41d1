"""Kernels under jax's transformations: stacks in scans, vmap, sharded arrays, threads."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import (
    LowRank,
    Packing,
    TernaryWeight,
    pack,
    packed_width,
    ternary_linear,
    ternary_matmul,
    ternary_matmul_transposed,
)
from fabric_kernels.ternary_matmul import Implementation

from tests.kernels.conftest import need_cpu_kernels

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).with_name("programs")
LAYERS, WIDTH, RANK = 3, 66, 3


def stack(packing: Packing, width: int = WIDTH) -> tuple[jax.Array, jax.Array, LowRank]:
    """Packed layers [L, N, W], their scales and their adapters; N = K."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-1, 2, (LAYERS, width, width))
    a, b = (
        jnp.asarray(rng.standard_normal((LAYERS, RANK, width)) / 8, jnp.float32) for _ in range(2)
    )
    packed = pack(jnp.asarray(codes, jnp.int8), packing)
    return packed, jnp.asarray([0.1, -0.2, 0.15], jnp.float32), LowRank(a, b, 2.0)


def rows(m: int, width: int = WIDTH) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal((m, width)), jnp.float32)


Body = Callable[[jax.Array, jax.Array, LowRank], jax.Array]


def scan_by_index(body: Body, x: jax.Array, adapters: LowRank) -> jax.Array:
    step = lambda h, layer: (body(h, *layer), None)  # noqa: E731
    return jax.lax.scan(step, x, (jnp.arange(LAYERS), adapters))[0]


def layer_of_stack(
    packed: jax.Array, scales: jax.Array, packing: Packing, implementation: Implementation
) -> Body:
    """A residual layer that names its weight by index."""

    def body(h: jax.Array, index: jax.Array, adapter: LowRank) -> jax.Array:
        weight = TernaryWeight(packed, scales, index, h.shape[-1], packing)
        return h + ternary_linear(h, (weight,), (adapter,), implementation=implementation)[0]

    return body


@pytest.mark.parametrize("packing", ["ternary2", "ternary1.6"])
@pytest.mark.parametrize("remat", [False, True], ids=["kept", "rematerialised"])
def test_layers_of_a_stack_by_index(
    packing: Packing, remat: bool, implementation: Implementation
) -> None:
    """A scan under jit and grad gives what the layers give one after another, to the last bit."""
    packed, scales, adapters = stack(packing)
    x = rows(5)

    def scanned(x: jax.Array, adapters: LowRank) -> jax.Array:
        body = layer_of_stack(packed, scales, packing, implementation)
        return scan_by_index(jax.checkpoint(body) if remat else body, x, adapters)

    def one_after_another(x: jax.Array, adapters: LowRank) -> jax.Array:
        for layer in range(LAYERS):
            weight = TernaryWeight(packed[layer], scales[layer], None, WIDTH, packing)
            adapter = jax.tree.map(lambda leaf, layer=layer: leaf[layer], adapters)
            x = x + ternary_linear(x, (weight,), (adapter,), implementation=implementation)[0]
        return x

    results = []
    for function in (scanned, one_after_another):
        y, pull = jax.vjp(jax.jit(function), x, adapters)
        results.append((y, pull(jnp.cos(y))))
    for found, expected in zip(*(jax.tree.leaves(result) for result in results), strict=True):
        if implementation == "cpu" and not remat:
            np.testing.assert_array_equal(found, expected)
        scale = float(jnp.max(jnp.abs(expected)))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("packing", ["ternary2", "ternary1.6"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_no_layer_is_copied(packing: Packing, backward: bool) -> None:
    """Temporaries of a scan by index are activations; one that slices copies a layer each step."""
    width = 1024
    packed = jax.ShapeDtypeStruct((LAYERS, width, packed_width(width, packing)), jnp.uint8)
    scales = jax.ShapeDtypeStruct((LAYERS,), jnp.float32)
    pair = jax.ShapeDtypeStruct((LAYERS, RANK, width), jnp.float32)
    x = jax.ShapeDtypeStruct((2, width), jnp.float32)

    def by_index(packed: jax.Array, scales: jax.Array, adapters: LowRank, x: jax.Array) -> Any:
        body = layer_of_stack(packed, scales, packing, "cpu")
        return jnp.sum(scan_by_index(jax.checkpoint(body), x, adapters))

    def by_slice(packed: jax.Array, scales: jax.Array, adapters: LowRank, x: jax.Array) -> Any:
        def body(h: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            one, scale, adapter = layer
            weight = TernaryWeight(one, scale, None, width, packing)
            return h + ternary_linear(h, (weight,), (adapter,), implementation="cpu")[0], None

        return jnp.sum(jax.lax.scan(jax.checkpoint(body), x, (packed, scales, adapters))[0])

    def temporaries(function: Callable[..., Any]) -> int:
        run = jax.grad(function, argnums=(2, 3)) if backward else function
        compiled = jax.jit(run).lower(packed, scales, LowRank(pair, pair, 2.0), x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    layer_bytes = width * packed_width(width, packing)
    assert temporaries(by_index) < layer_bytes / 2
    assert temporaries(by_slice) > layer_bytes


def calls(function: Callable[..., Any], *arguments: Any) -> tuple[int, int]:
    """(calls of our kernels, loops) in the compiled program."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    assert text is not None
    return text.count('custom_call_target="fabric_ternary'), text.count(" while(")


def weight_of(packed: jax.Array, packing: Packing = "ternary2") -> TernaryWeight:
    return TernaryWeight(packed, jnp.float32(0.25), None, WIDTH, packing)


@pytest.mark.parametrize("packing", ["ternary2", "ternary1.6"])
def test_vmap_over_rows_is_one_call(packing: Packing) -> None:
    packed, _, _ = stack(packing)
    need = jnp.asarray(np.random.default_rng(2).integers(-128, 128, (2, 3, 5, WIDTH)), jnp.int8)
    floats = need.astype(jnp.float32) / 7
    product = lambda x: ternary_matmul(x, packed[0], packing=packing, implementation="cpu")  # noqa: E731
    linear = lambda x: ternary_linear(x, [weight_of(packed[0], packing)], implementation="cpu")[0]  # noqa: E731
    transposed = lambda g: ternary_matmul_transposed(  # noqa: E731
        g, packed[0], WIDTH, packing=packing, implementation="cpu"
    )
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(linear(x))))
    for function, x, expected_calls in (
        (product, need, 1),
        (linear, floats, 1),
        (transposed, floats, 1),
        (gradient, floats, 2),
    ):
        for mapped, example in (
            (jax.vmap(function), x[0]),
            (jax.vmap(jax.vmap(function)), x),
            (jax.vmap(function, in_axes=1, out_axes=1), x[0]),
        ):
            assert calls(mapped, example) == (expected_calls, 0)
            np.testing.assert_array_equal(mapped(example), function(example))


@pytest.mark.parametrize("packing", ["ternary2", "ternary1.6"])
def test_vmap_over_weights(packing: Packing, implementation: Implementation) -> None:
    packed, _, _ = stack(packing)
    x = jnp.asarray(np.random.default_rng(2).integers(-128, 128, (2, 4, WIDTH)), jnp.int8)

    def product(x: jax.Array, packed: jax.Array) -> jax.Array:
        return ternary_matmul(x, packed, packing=packing, implementation=implementation)

    over_weights = jax.vmap(product, in_axes=(None, 0))
    nested = jax.jit(jax.vmap(over_weights, in_axes=(0, None)))(x, packed)
    both = jax.jit(jax.vmap(product))(jnp.stack([*x, x[0]]), packed)
    twice = jax.jit(jax.vmap(jax.vmap(product)))(x, packed[:2, None].repeat(4, axis=1))
    for layer in range(LAYERS):
        expected = product(x, packed[layer])
        np.testing.assert_array_equal(nested[:, layer], expected)
        np.testing.assert_array_equal(both[layer], product([*x, x[0]][layer], packed[layer]))
        if layer < 2:
            np.testing.assert_array_equal(twice[layer], product(x[layer], packed[layer]))


def test_vmap_over_layers_of_a_stack(implementation: Implementation) -> None:
    packed, scales, _ = stack("ternary2")
    x = rows(4)

    def linear(layer: jax.Array, x: jax.Array) -> jax.Array:
        weight = TernaryWeight(packed, scales, layer, WIDTH)
        return ternary_linear(x, (weight,), implementation=implementation)[0]

    found = jax.vmap(linear, in_axes=(0, None))(jnp.arange(LAYERS), x)
    for layer in range(LAYERS):
        np.testing.assert_allclose(found[layer], linear(jnp.int32(layer), x), rtol=1e-6)


@pytest.mark.parametrize("nested", [False, True])
def test_gradients_of_each_example(nested: bool, implementation: Implementation) -> None:
    """vmap of grad with an adapter: one dA, dB and dx for each example, as in a Python loop."""
    packed, _, adapters = stack("ternary2")
    adapter = jax.tree.map(lambda leaf: leaf[0], adapters)
    examples = jnp.asarray(np.random.default_rng(3).standard_normal((2, 3, 5, WIDTH)), jnp.float32)

    @jax.jit
    def gradient(adapter: LowRank, x: jax.Array) -> Any:
        def loss(adapter: LowRank, x: jax.Array) -> jax.Array:
            weights = (weight_of(packed[0]), weight_of(packed[1]))
            y = ternary_linear(x, weights, (adapter, None), implementation=implementation)
            return jnp.sum(jnp.sin(y[0]) * y[1])

        return jax.grad(loss, argnums=(0, 1))(adapter, x)

    each = jax.vmap(gradient, in_axes=(None, 0))
    found = (
        jax.vmap(each, in_axes=(None, 0))(adapter, examples)
        if nested
        else each(adapter, examples[0])
    )
    chosen = [(i, j) for i in range(2 if nested else 1) for j in range(3)]
    for i, j in chosen:
        expected = gradient(adapter, examples[i, j])
        one = jax.tree.map(lambda leaf, at=(i, j) if nested else (j,): leaf[at], found)
        for ours, reference in zip(jax.tree.leaves(one), jax.tree.leaves(expected), strict=True):
            assert ours.shape == reference.shape
            np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=1e-4)


def test_gradients_of_a_batch_add_up(implementation: Implementation) -> None:
    """grad of vmap: the adapter's gradient is the sum over examples."""
    packed, _, adapters = stack("ternary2")
    adapter = jax.tree.map(lambda leaf: leaf[0], adapters)
    x = rows(6).reshape(3, 2, WIDTH)

    def loss(adapter: LowRank, mapped: bool) -> jax.Array:
        def linear(x: jax.Array) -> jax.Array:
            return ternary_linear(
                x, (weight_of(packed[0]),), (adapter,), implementation=implementation
            )[0]

        return jnp.sum(jnp.sin((jax.vmap(linear) if mapped else linear)(x)))

    by_vmap, at_once = (
        jax.jit(jax.grad(loss), static_argnums=1)(adapter, mapped) for mapped in (True, False)
    )
    np.testing.assert_allclose(by_vmap.a, at_once.a, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(by_vmap.b, at_once.b, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("cpu_kernels")
def test_a_layer_beyond_the_stack_is_an_error() -> None:
    packed, scales, _ = stack("ternary2")
    for layer in (LAYERS, -1):
        weight = TernaryWeight(packed, scales, jnp.int32(layer), WIDTH)
        with pytest.raises(Exception, match=f"layer {layer} is not in the stack"):
            ternary_linear(rows(2), (weight,), implementation="cpu")[0].block_until_ready()


def start(program: str, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
    """A program as a process of its own, whose set-up of jax may differ from ours."""
    path = os.pathsep.join(str(ROOT / folder) for folder in ("kernels", "."))
    return subprocess.Popen(
        [sys.executable, str(PROGRAMS / f"{program}.py"), *arguments],
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(process: "subprocess.Popen[str]") -> str:
    try:
        out, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"deadlock? {process.args} has not ended: {process.communicate()}")
    assert process.returncode == 0, errors
    return out.strip()


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_sharded_arrays(implementation: str) -> None:
    """Rows or outputs on four devices, under jit and shard_map, give the same numbers."""
    if implementation == "cpu":
        need_cpu_kernels()
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    assert output(start("virtual_devices", implementation, XLA_FLAGS=flags)) == "equal"


@pytest.mark.usefixtures("cpu_kernels")
def test_results_do_not_depend_on_threads() -> None:
    """Pools of 1, 2 and 8 threads, all at once, each called by four threads at once."""
    counts = (1, 2, 8)
    running = [start("many_threads", NPROC=str(count)) for count in counts]
    results = [json.loads(output(process)) for process in running]
    assert len(results[0]["digests"]) == 1
    for result, count in zip(results, counts, strict=True):
        assert result["digests"] == results[0]["digests"]
        assert result["pool"] in (count, None)
