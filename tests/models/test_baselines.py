"""The 16-bit families without an oracle: decoding, packed rows, training, precision."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fabric_jax.data.batch import Batch
from fabric_jax.layers.kv_cache import empty_cache
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderDefinition, DecoderOptions, define_decoder
from fabric_jax.models.initialize import Tree, initialize_adapter, initialize_base
from fabric_jax.models.registry import get_config
from fabric_jax.training.config import OptimizerConfig
from fabric_jax.training.optimizer import make_optimizer
from fabric_jax.training.step import init_state, make_train_step
from tests.models import baseline_models as tiny
from tests.models.running import whole_rows

pytestmark = pytest.mark.xdist_group("baselines")

T = tiny.LENGTH


def build(config: ModelConfig, **options: Any) -> tuple[DecoderDefinition, Tree]:
    """A decoder with weights large enough for attention to be far from uniform."""
    definition = define_decoder(config, DecoderOptions(mode="float", **options))
    base = initialize_base(definition, 0)
    random = np.random.default_rng(0)

    def spread(path: Any, leaf: jax.Array) -> jax.Array:
        if path[-1].key == "gain":
            return leaf + jnp.asarray(random.normal(0, 0.3, leaf.shape), leaf.dtype)
        return leaf * jnp.asarray(12, leaf.dtype)

    return definition, jax.tree_util.tree_map_with_path(spread, base)


def test_names_of_the_norms() -> None:
    definition = define_decoder(tiny.GEMMA3, DecoderOptions(mode="float"))
    layers = nnx.to_pure_dict(definition.base)["layers"]
    shapes = {
        "attention_norm": layers["attention_norm"]["gain"].shape,
        "attention_post_norm": layers["attention_post_norm"]["gain"].shape,
        "mlp_norm": layers["mlp_norm"]["gain"].shape,
        "mlp_post_norm": layers["mlp_post_norm"]["gain"].shape,
    }
    assert set(shapes.values()) == {(7, 48)}
    assert layers["attention"]["q_norm"]["gain"].shape == (7, 16)
    assert layers["attention"]["k_norm"]["gain"].shape == (7, 16)
    assert "sub_norm" not in layers["attention"]


@pytest.mark.parametrize(("name", "prompt"), [("gemma3", 1), ("gemma3", 9), ("qwen3", 9)])
def test_decoding_equals_the_full_forward(name: str, prompt: int) -> None:
    """A prompt, then token by token, past the sliding window by far."""
    config = tiny.CONFIGS[name]
    definition, base = build(config)
    tokens, positions, segments = whole_rows(tiny.tokens_of(config))
    full = jax.jit(lambda base, *batch: definition.bind(base, {})(*batch))
    expected = np.asarray(full(base, tokens, positions, segments))
    extend = jax.jit(lambda base, *arguments: definition.bind(base, {}).extend(*arguments))
    cache = empty_cache(
        config.num_layers, 2, T + 2, config.num_kv_heads, config.head_dim, "float32"
    )
    found: list[np.ndarray] = []
    for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, T))]:
        hidden, cache = extend(base, tokens[:, start:stop], positions[:, start:stop], cache)
        found.append(np.asarray(hidden))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.concatenate(found, 1), expected, rtol=0, atol=1e-5 * scale)


def test_the_window_decides_what_reaches_a_token() -> None:
    """With local layers alone a change travels (window - 1) tokens a layer, and no further."""
    config = replace(tiny.GEMMA3, num_layers=3, global_every=4, sliding_window=4)
    definition, base = build(config)
    run = jax.jit(lambda base, *batch: definition.bind(base, {})(*batch))
    tokens, positions, segments = whole_rows(tiny.tokens_of(config, rows=1))
    before = np.asarray(run(base, tokens, positions, segments))
    after = np.asarray(run(base, tokens.at[0, 2].add(1), positions, segments))
    changed = np.flatnonzero(np.any(before[0] != after[0], axis=-1))
    assert changed.tolist() == list(range(2, 2 + 3 * 3 + 1))


def test_packed_documents_get_what_they_get_alone() -> None:
    """Documents longer than the window, one behind the other in a row."""
    definition, base = build(tiny.GEMMA3)
    run = jax.jit(lambda base, *batch: definition.bind(base, {})(*batch))
    tokens = tiny.tokens_of(tiny.GEMMA3, rows=1)
    lengths = (10, T - 10)
    segments = np.repeat([1, 2], lengths)[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32)
    packed = np.asarray(run(base, *map(jnp.asarray, (tokens, positions, segments))))
    for start, stop in ((0, 10), (10, T)):
        alone = np.asarray(run(base, *whole_rows(tokens[:, start:stop])))
        bound = 1e-5 * np.abs(alone).max()
        np.testing.assert_allclose(packed[:, start:stop], alone, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("name", "remat"), [("qwen3", "linears"), ("gemma3", "none"), ("gemma3", "linears")]
)
def test_training_moves_every_adapter_and_lowers_the_loss(name: str, remat: str) -> None:
    config = replace(tiny.CONFIGS[name], num_layers=2)
    if name == "gemma3":
        config = replace(config, global_every=2)
    definition, base = build(config, lora=LoraConfig(rank=2, alpha=4.0), remat=remat)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.0), 20)
    tokens, positions, segments = (x[None] for x in whole_rows(tiny.tokens_of(config)))
    batch = Batch(
        tokens=tokens,
        targets=jnp.roll(tokens, -1, axis=-1),
        loss_mask=jnp.ones(tokens.shape, jnp.float32),
        segment_ids=segments,
        positions=positions,
    )
    adapter = initialize_adapter(definition, 0)
    first = jax.tree.map(np.array, adapter)
    targets = {"attention": {"q", "k", "v", "o"}, "mlp": {"gate", "up", "down"}}
    assert {part: set(linears) for part, linears in first["layers"].items()} == targets
    step = make_train_step(definition, optimizer)
    state, losses = init_state(adapter, optimizer), []
    for _ in range(6):
        state, metrics = step(state, base, batch, jax.random.key(0))
        losses.append(float(metrics.loss))
    assert np.all(np.diff(losses) < 0)
    moved = jax.tree.map(lambda a, b: bool(np.all(np.any(a != b, (1, 2)))), first, state.params)
    assert all(jax.tree.leaves(moved))


def test_the_factor_on_embeddings_is_rounded_to_their_dtype() -> None:
    """sqrt(1152) = 33.94 is 34 in bfloat16, which released models were trained with."""
    config = replace(tiny.GEMMA3, hidden_size=1152, num_layers=2, vocab_size=5)
    tokens = jnp.arange(5, dtype=jnp.int32)[None]
    for dtype, factor in (("bfloat16", 34.0), ("float32", np.float32(np.sqrt(1152)))):
        definition = define_decoder(config, DecoderOptions(mode="float", dtype=dtype))
        table = jnp.asarray(np.random.default_rng(0).normal(size=(5, 1152)), dtype)
        base = nnx.to_pure_dict(definition.base) | {"embedding": table}
        found = definition.bind(base, {}).embed(tokens)
        assert found.dtype == table.dtype
        np.testing.assert_array_equal(found[0], table * jnp.asarray(factor, table.dtype))


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_fresh_norms_multiply_by_one(name: str) -> None:
    config = tiny.CONFIGS[name]
    base = initialize_base(define_decoder(config, DecoderOptions(mode="float")), 0)
    gains = [
        leaf for path, leaf in jax.tree_util.tree_leaves_with_path(base) if path[-1].key == "gain"
    ]
    assert len(gains) == {"qwen3": 5, "gemma3": 7, "llama3": 3}[name]
    assert all(bool(jnp.all(gain + config.norm_offset == 1)) for gain in gains)


# Published totals of the text models: huggingface.co/Qwen/Qwen3-0.6B, google/gemma-3-1b-pt.
@pytest.mark.parametrize(
    ("name", "total"), [("qwen3-0.6b", 596_049_920), ("gemma-3-1b", 999_885_952)]
)
def test_parameters_to_the_unit(name: str, total: int) -> None:
    assert get_config(name).parameters == total
