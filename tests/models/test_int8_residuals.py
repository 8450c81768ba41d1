"""Rematerialisation from int8 codes: the loss as it is, gradients nearly so, a quarter of bytes."""

import re
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import select_implementation
from flax import nnx

from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderDefinition, DecoderOptions, define_decoder
from fabric_jax.models.initialize import initialize_adapter, initialize_base
from fabric_jax.models.registry import get_config
from fabric_jax.training.config import OptimizerConfig
from fabric_jax.training.optimizer import make_optimizer

GROUPED = replace(
    get_config("bitnet-tiny"),
    num_layers=2,
    hidden_size=64,
    ffn_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=61,
)
PLAIN = replace(GROUPED, sub_norms=False, tied_head=False, activation="relu2", num_kv_heads=4)
GEMMA = replace(
    get_config("gemma-3-1b"),
    num_layers=3,
    hidden_size=48,
    ffn_size=80,
    num_heads=4,
    num_kv_heads=1,
    head_dim=16,
    vocab_size=61,
)
QWEN = replace(
    GEMMA,
    **{
        name: getattr(get_config("qwen3-0.6b"), name)
        for name in ("qk_norm", "post_norms", "norm_offset", "activation", "embedding_scale")
    },
)
B, T = 2, 12
LORA = LoraConfig(rank=4)
CASES: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "grouped": (GROUPED, {}),
    "xla": (GROUPED, {"implementation": "xla"}),
    "plain": (PLAIN, {}),
    "dropout": (GROUPED, {"lora": LoraConfig(rank=4, dropout=0.3)}),
    "dropout-xla": (PLAIN, {"lora": LoraConfig(rank=4, dropout=0.3), "implementation": "xla"}),
    "some-targets": (PLAIN, {"lora": LoraConfig(rank=4, targets=("q", "down"))}),
    "block256": (GROUPED, {"act_quant": "block256"}),
    "master": (GROUPED, {"mode": "master"}),
    "float": (GROUPED, {"mode": "float"}),
    "gemma": (GEMMA, {"mode": "float"}),
    "qwen": (QWEN, {"mode": "float"}),
}


def batch(seed: int, length: int = T) -> tuple[jax.Array, ...]:
    """Tokens, positions, segments and targets of rows that hold two documents and padding."""
    random = np.random.default_rng(seed)
    tokens, targets = random.integers(0, 61, (2, B, length))
    half = length // 2
    segments = np.repeat([1, 2, 0], [half, length - half - 1, 1])
    positions = np.concatenate([np.arange(half), np.arange(length - half)])
    rows = (np.broadcast_to(row, (B, length)) for row in (positions, segments))
    return tuple(jnp.asarray(part, jnp.int32) for part in (tokens, *rows, targets))


def define(config: ModelConfig, remat: str, **options: Any) -> DecoderDefinition:
    return define_decoder(config, DecoderOptions(**{"lora": LORA, **options}, remat=remat))


def parameters(definition: DecoderDefinition, spread: float = 50) -> tuple[Any, Any]:
    """A base with embeddings of order ``spread / 50``, and an adapter that does something."""
    base = initialize_base(definition, 0)
    base["embedding"] = base["embedding"] * spread
    random = np.random.default_rng(1)
    adapter = jax.tree.map(
        lambda a: a + jnp.asarray(random.normal(0, 0.05, a.shape), a.dtype),
        initialize_adapter(definition, 1),
    )
    return base, adapter


def loss_of(definition: DecoderDefinition) -> Any:
    def loss(adapter: Any, base: Any, rows: tuple[jax.Array, ...]) -> jax.Array:
        tokens, positions, segments, targets = rows
        decoder = definition.bind(base, adapter)
        hidden = decoder(tokens, positions, segments, jax.random.key(3))
        weights = (segments > 0).astype(jnp.float32)
        return decoder.loss(hidden, targets, weights) / jnp.sum(weights)

    return loss


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_the_loss_is_the_same_and_gradients_nearly(case: str) -> None:
    config, options = CASES[case]
    found: dict[str, tuple[jax.Array, Any]] = {}
    for remat in ("none", "int8-residuals"):
        definition = define(config, remat, **options)
        base, adapter = parameters(definition)
        program = jax.jit(jax.value_and_grad(loss_of(definition)))
        found[remat] = program(adapter, base, batch(0))
    (loss, exact), (other, rounded) = found["none"], found["int8-residuals"]
    assert float(loss) == float(other)
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(exact), strict=True)
    for path, g, h in zip(paths, leaves, jax.tree.leaves(rounded), strict=True):
        one, two = (np.asarray(x, np.float64).ravel() for x in (g, h))
        norm = np.linalg.norm(one)
        assert np.linalg.norm(two - one) < 0.02 * norm, jax.tree_util.keystr(path)
        assert one @ two > 0.999 * norm * np.linalg.norm(two), jax.tree_util.keystr(path)


def curve(remat: str) -> np.ndarray:
    """Losses of 100 steps of Adam on the rows of one batch, whose tokens can be learnt by heart."""
    definition = define(GROUPED, remat)
    (base, _), adapter = parameters(definition, 5), initialize_adapter(definition, 1)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0), 1000)
    rows = batch(0)

    @jax.jit
    def step(adapter: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_of(definition))(adapter, base, rows)
        updates, state = optimizer.update(gradients, state, adapter)
        return jax.tree.map(jnp.add, adapter, updates), state, loss

    state, losses = optimizer.init(adapter), []
    for _ in range(100):
        adapter, state, loss = step(adapter, state)
        losses.append(float(loss))
    return np.array(losses)


def test_training_goes_the_same_way() -> None:
    kept, rounded = curve("linears"), curve("int8-residuals")
    assert kept[-1] < 0.5 * kept[0]
    assert rounded[0] == kept[0]
    assert np.abs(rounded - kept).max() < 0.05 * kept[0]
    assert abs(rounded[-10:].mean() - kept[-10:].mean()) < 0.01 * kept[0]


@cache
def compiled(remat: str, layers: int, implementation: str) -> jax.stages.Compiled:
    """Loss and gradients of a decoder whose activations outweigh its adapters."""
    config = replace(GROUPED, num_layers=layers, hidden_size=128, ffn_size=384, head_dim=32)
    definition = define(config, remat, lora=LoraConfig(rank=2), implementation=implementation)
    base, adapter = (
        jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), nnx.to_pure_dict(state)
        )
        for state in (definition.base, definition.adapter)
    )
    rows = jax.eval_shape(lambda: batch(0, 64))
    return jax.jit(jax.value_and_grad(loss_of(definition))).lower(adapter, base, rows).compile()


def growth(remat: str, implementation: str) -> float:
    few, many = (
        compiled(remat, layers, implementation).memory_analysis().temp_size_in_bytes
        for layers in (8, 24)
    )
    return (many - few) / 16


IMPLEMENTATIONS = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(select_implementation() != "cpu", reason="no CPU kernels")
    ),
    "xla",
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.slow
def test_a_further_layer_costs_a_third_of_what_floats_cost(implementation: str) -> None:
    rounded, kept = (growth(remat, implementation) for remat in ("int8-residuals", "linears"))
    assert 0 < rounded < 0.4 * kept


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_product_with_a_packed_weight_is_computed_again(implementation: str) -> None:
    """Four calls, or seven int8 products, are the forward pass; ``layer`` shows more of them."""
    forward = {
        "cpu": r'custom_call_target="fabric_ternary_linear"',
        "xla": r" = s32\[[\d,]+\]\S* dot\(",
    }[implementation]
    counts = {
        remat: len(re.findall(forward, compiled(remat, 8, implementation).as_text()))
        for remat in ("linears", "int8-residuals", "layer")
    }
    assert counts["int8-residuals"] == counts["linears"] == (4 if implementation == "cpu" else 7)
    assert counts["layer"] > counts["linears"]
