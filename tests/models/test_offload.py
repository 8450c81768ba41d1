"""Layers' inputs in the host's memory: the same numbers as when they are kept on the device."""

import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fabric_jax.data.batch import Batch
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.decoder import DecoderDefinition, DecoderOptions, define_decoder
from fabric_jax.models.initialize import initialize_adapter, initialize_base
from fabric_jax.models.offload import scan_offloaded
from fabric_jax.models.registry import get_config
from fabric_jax.training.config import OptimizerConfig
from fabric_jax.training.optimizer import make_optimizer
from fabric_jax.training.step import init_state, make_train_step

CONFIG = replace(get_config("bitnet-tiny"), num_layers=3)
ROWS, LENGTH = 2, 12


def layer(h: jax.Array, index: jax.Array, x: Any, consts: Any) -> jax.Array:
    """A float layer with a trained matrix, another one, and what all layers share."""
    own, other = x
    return h + jnp.tanh(h @ own + consts["bias"][None]) @ other * (
        1.0 + 0.1 * index.astype(jnp.float32)
    )


def numbers(layers: int) -> tuple[jax.Array, Any, Any]:
    rng = np.random.default_rng(layers)
    own, other = (jnp.asarray(rng.normal(size=(layers, 5, 5)), jnp.float32) for _ in range(2))
    h = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)
    return h, (own, other), {"bias": jnp.asarray(rng.normal(size=5), jnp.float32)}


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("wanted", [(0,), (0, 1), (1,)])
def test_gradients_are_those_of_the_plain_scan(
    layers: int, unroll: bool, wanted: tuple[int, ...]
) -> None:
    h, (own, other), consts = numbers(layers)

    def offloaded(h: jax.Array, own: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(scan_offloaded(layer, h, (own, other), consts, unroll=unroll)))

    def plain(h: jax.Array, own: jax.Array) -> jax.Array:
        for i in range(layers):
            h = layer(h, jnp.int32(i), (own[i], other[i]), consts)
        return jnp.sum(jnp.sin(h))

    found = jax.jit(jax.value_and_grad(offloaded, wanted))(h, own)
    expected = jax.jit(jax.value_and_grad(plain, wanted))(h, own)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), found, expected)
    # A function that is compiled before it is differentiated.
    again = jax.grad(jax.jit(offloaded), wanted)(h, own)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), again, expected[1])


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_the_last_layer_is_computed_once(layers: int) -> None:
    h, xs, consts = numbers(layers)
    computed: list[int] = []

    def counted(h: jax.Array, index: jax.Array, x: Any, consts: Any) -> jax.Array:
        jax.debug.callback(lambda i: computed.append(int(i)), index)
        return layer(h, index, x, consts)

    def total(h: jax.Array) -> jax.Array:
        return jnp.sum(scan_offloaded(counted, h, xs, consts, unroll=False))

    jax.block_until_ready(jax.jit(jax.grad(total))(h))
    jax.effects_barrier()
    assert sorted(computed) == sorted([*range(layers), *range(layers - 1)])


def define(remat: Any, **options: Any) -> DecoderDefinition:
    settings: dict[str, Any] = {"lora": LoraConfig(rank=2), "implementation": "xla"} | options
    return define_decoder(CONFIG, DecoderOptions(remat=remat, **settings))


def batch(count: int = 1) -> Batch:
    rng = np.random.default_rng(7)
    shape = (count, ROWS, LENGTH)
    tokens, targets = (rng.integers(0, CONFIG.vocab_size, shape, np.int32) for _ in range(2))
    mask = (rng.random(shape) < 0.8).astype(np.float32)
    segments = np.sort(rng.integers(1, 3, shape, np.int32), axis=-1)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape)
    arrays = (jnp.asarray(a) for a in (tokens, targets, mask, segments, positions))
    names = ("tokens", "targets", "loss_mask", "segment_ids", "positions")
    return Batch(**dict(zip(names, arrays, strict=True)))


def after_a_step(remat: str, micro_batches: int = 1, **options: Any) -> tuple[Any, Any]:
    """The metrics of a step, and how it moved the adapter: by a multiple of the gradient."""
    definition = define(remat, **options)
    optimizer = optax.sgd(1e3)
    adapter = jax.tree.map(lambda a: a + 0.05, initialize_adapter(definition, 0))
    start = jax.tree.map(jnp.copy, adapter)
    step = make_train_step(definition, optimizer)
    frozen, key = initialize_base(definition, 0), jax.random.key(1)
    state, metrics = step(init_state(adapter, optimizer), frozen, batch(micro_batches), key)
    return metrics, jax.tree.map(jnp.subtract, state.params, start)


@pytest.mark.parametrize(
    ("micro_batches", "options"),
    [
        (1, {}),
        (2, {}),
        # Codes would jump where a fusion rounds otherwise.
        (1, {"dtype": "bfloat16", "act_quant": "none"}),
        (1, {"lora": LoraConfig(rank=2, dropout=0.1)}),
        (1, {"unroll": True}),
    ],
)
def test_a_step_is_that_of_recomputed_layers(micro_batches: int, options: Any) -> None:
    """Loss, norm of the gradient and adapter, to the last bits that XLA's fusions leave open."""
    found, kept = (after_a_step(r, micro_batches, **options) for r in ("offload", "layer"))
    tolerance = 3e-2 if "dtype" in options else 1e-5
    np.testing.assert_allclose(found[0].loss, kept[0].loss, rtol=tolerance)
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(kept[1]))
    assert largest > 0
    close = partial(np.testing.assert_allclose, rtol=0, atol=tolerance * largest)
    jax.tree.map(close, found[1], kept[1])


def test_masters_are_trained_alike() -> None:
    """All weights get a gradient: masters, gains, embedding and head."""
    optimizer = make_optimizer(OptimizerConfig(), 10)
    trained = []
    for remat in ("offload", "layer"):
        definition = define(remat, mode="master", lora=LoraConfig(rank=0), norm_dtype="float32")
        base: Any = initialize_base(definition, 0)
        step = make_train_step(definition, optimizer, trains="base")
        start = jax.tree.map(jnp.copy, base)
        state, metrics = step(init_state(base, optimizer), {}, batch(), jax.random.key(1))
        moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), state.params, start)
        assert all(change > 0 for change in jax.tree.leaves(moved)), moved
        trained.append((metrics, state.params))
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, *trained)


def test_the_inputs_are_sent_to_the_host_and_nothing_else_is_kept() -> None:
    definition = define("offload")
    base, adapter = (nnx.to_pure_dict(tree) for tree in (definition.base, definition.adapter))
    optimizer = make_optimizer(OptimizerConfig(), 10)
    state = jax.eval_shape(lambda tree: init_state(tree, optimizer), adapter)
    key = jax.eval_shape(lambda: jax.random.key(0))
    step: Any = make_train_step(definition, optimizer)
    # The CPU has one memory, and its program names none.
    text = step.trace(state, base, batch(), key).lower(lowering_platforms=("cuda",)).as_text()
    places = re.findall(r"annotate_device_placement.*?_xla_buffer_placement = \"(\w+)\"", text)
    assert sorted(set(places)) == ["device", "pinned_host"]
    stack = f"{CONFIG.num_layers - 1}x{ROWS}x{LENGTH}x{CONFIG.hidden_size}x"
    wider = rf"tensor<{CONFIG.num_layers - 1}x{ROWS}x{LENGTH}x(?!{CONFIG.hidden_size}x)\d+x"
    assert stack in text
    assert re.search(wider, text) is None


def test_a_forward_pass_alone_sends_nothing() -> None:
    definition = define("offload")
    one = jax.tree.map(lambda x: x[0], batch())
    base, adapter = initialize_base(definition, 0), initialize_adapter(definition, 0)

    def hidden(adapter: Any) -> jax.Array:
        decoder = definition.bind(base, adapter)
        return decoder(one.tokens, one.positions, one.segment_ids)

    assert "pinned_host" not in jax.jit(hidden).lower(adapter).as_text()
