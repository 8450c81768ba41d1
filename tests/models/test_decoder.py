"""The decoder: who sees whom, the cache, the loss, rematerialisation, dropout."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric_jax.layers.kv_cache import empty_cache
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderDefinition, DecoderOptions, define_decoder
from fabric_jax.models.initialize import initialize_adapter, initialize_base
from fabric_jax.models.registry import get_config

BITNET = replace(
    get_config("bitnet-tiny"),
    num_layers=2,
    hidden_size=32,
    ffn_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=61,
)
LLAMA = replace(BITNET, sub_norms=False, tied_head=False, activation="relu2")
B, T = 2, 10


def build(config: ModelConfig, **options: Any) -> tuple[DecoderDefinition, dict[str, Any]]:
    definition = define_decoder(config, DecoderOptions(**options))
    base = initialize_base(definition, 0)
    # Embeddings of order 1 rather than 0.02.
    base["embedding"] = base["embedding"] * 50
    return definition, base


Program = Callable[..., Any]


def forward_of(definition: DecoderDefinition) -> Program:
    """``(base, adapter, *batch)``, compiled.

    Weights are arguments: as constants, XLA would spend seconds on computing with them.
    """
    return jax.jit(lambda base, adapter, *batch: definition.bind(base, adapter)(*batch))


def extend_of(definition: DecoderDefinition) -> Program:
    """``(base, tokens, positions, cache)``, compiled."""
    return jax.jit(lambda base, *arguments: definition.bind(base, {}).extend(*arguments))


def sample(seed: int = 0, shape: tuple[int, int] = (B, T)) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, 61, shape), jnp.int32)


def positions_of(segments: np.ndarray) -> np.ndarray:
    """Position inside the segment, from 0."""
    out = np.zeros_like(segments)
    for b, t in np.ndindex(segments.shape):
        if t and segments[b, t] == segments[b, t - 1]:
            out[b, t] = out[b, t - 1] + 1
    return out


@cache
def default_forward() -> Program:
    definition, base = build(BITNET)
    return partial(forward_of(definition), base, {})


def hidden_of(*batch: jax.Array) -> jax.Array:
    return default_forward()(*batch)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_token_sees_its_past_in_its_own_segment_alone(data: st.DataObject) -> None:
    """Changing one token changes exactly the later tokens of its segment, bit for bit."""
    cuts = data.draw(st.lists(st.booleans(), min_size=B * T, max_size=B * T))
    segments = 1 + np.cumsum(np.array(cuts).reshape(B, T), axis=1).astype(np.int32)
    row, at = data.draw(st.integers(0, B - 1)), data.draw(st.integers(0, T - 1))
    tokens = sample()
    other = tokens.at[row, at].set((tokens[row, at] + data.draw(st.integers(1, 60))) % 61)
    where = (jnp.asarray(positions_of(segments)), jnp.asarray(segments))
    before, after = (np.asarray(hidden_of(t, *where)) for t in (tokens, other))
    may_differ = np.zeros((B, T), bool)
    may_differ[row, at:] = segments[row, at:] == segments[row, at]
    np.testing.assert_array_equal(before[~may_differ], after[~may_differ])
    assert np.any(before[row, at] != after[row, at])


def test_a_packed_row_gives_each_document_what_it_gets_alone() -> None:
    """One row of two documents against two rows: same sums in another order."""
    tokens = sample(1, (1, T))
    segments = np.array([[1] * 4 + [2] * 6], np.int32)
    packed = hidden_of(
        jnp.tile(tokens, (B, 1)),
        jnp.asarray(np.tile(positions_of(segments), (B, 1))),
        jnp.asarray(np.tile(segments, (B, 1))),
    )[0]
    for start, stop in ((0, 4), (4, 10)):
        length = stop - start
        alone = hidden_of(
            tokens[:, start:stop],
            jnp.arange(length, dtype=jnp.int32)[None],
            jnp.ones((1, length), jnp.int32),
        )[0]
        different = np.abs(np.asarray(packed[start:stop]) - np.asarray(alone)).max(-1)
        # An int8 code that lies on a rounding boundary may fall to the other side.
        assert np.median(different) < 1e-5
        assert different.max() < 0.3


@pytest.mark.parametrize("config", [BITNET, LLAMA], ids=["bitnet", "llama"])
@pytest.mark.parametrize("act_quant", ["per_token", "none"])
def test_the_cache_path_equals_the_plain_path(config: ModelConfig, act_quant: str) -> None:
    definition, base = build(config, act_quant=act_quant)
    tokens = sample(2)
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    plain = forward_of(definition)(base, {}, tokens, positions, jnp.ones((B, T), jnp.int32))
    extend = extend_of(definition)
    cache = empty_cache(2, B, T + 3, 2, 8, "float32")
    pieces = []
    for start, stop in ((0, 6), (6, 7), (7, 8), (8, 10)):
        piece = slice(start, stop)
        part, cache = extend(base, tokens[:, piece], positions[:, piece], cache)
        pieces.append(part)
    found = np.asarray(jnp.concatenate(pieces, 1))
    different = np.abs(found - np.asarray(plain)).max(-1)
    assert np.median(different) < 1e-5
    assert different.max() < (1e-4 if act_quant == "none" else 0.3)


def test_prompts_of_different_lengths_share_a_cache() -> None:
    """Padding behind the shorter prompt is overwritten before a later token can see it."""
    definition, base = build(BITNET, act_quant="none")
    forward, extend = forward_of(definition), extend_of(definition)
    tokens, lengths = sample(3), np.array([6, 3])
    cache = empty_cache(2, B, T, 2, 8, "float32")
    prompt = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32)[None], (B, 6))
    _, cache = extend(base, tokens[:, :6], prompt, cache)
    following = sample(4, (B, 3))
    for step in range(3):
        at = jnp.asarray(lengths + step, jnp.int32)[:, None]
        found, cache = extend(base, following[:, step : step + 1], at, cache)
    for row, length in enumerate(lengths):
        whole = jnp.concatenate([tokens[row, :length], following[row]])[None]
        count = int(length) + 3
        positions = jnp.arange(count, dtype=jnp.int32)[None]
        expected = forward(base, {}, whole, positions, jnp.ones((1, count), jnp.int32))
        np.testing.assert_allclose(found[row, 0], expected[0, -1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("config", [BITNET, LLAMA], ids=["tied", "untied"])
def test_the_loss_is_the_cross_entropy_of_the_logits(config: ModelConfig) -> None:
    definition, base = build(config)
    decoder = definition.bind(base, {})
    tokens, targets = sample(5), sample(6)
    weights = jnp.asarray(np.random.default_rng(7).random((B, T)), jnp.float32)
    hidden = decoder(
        tokens,
        jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T)),
        jnp.ones((B, T), jnp.int32),
    )
    head = base["embedding"] if config.tied_head else base["head"]
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    np.testing.assert_allclose(decoder.logits(hidden), logits, rtol=0, atol=1e-5 * logits.max())
    log_z = np.log(np.exp(logits - logits.max()).sum(-1)) + logits.max()
    chosen = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    expected = np.sum(np.asarray(weights, np.float64) * (log_z - chosen))
    assert float(decoder.loss(hidden, targets, weights)) == pytest.approx(expected, rel=1e-5)


def test_neither_rematerialisation_nor_unrolling_changes_a_gradient() -> None:
    """Without codes, which fusion may move, gradients differ by rounding alone."""
    key = jax.random.key(0)
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    batch = (sample(8), positions, jnp.ones((B, T), jnp.int32))
    gradients: list[Any] = []
    operations: dict[tuple[str, bool], float] = {}
    for option, unroll in (
        *(("none", False), ("linears", False), ("layer", False)),
        *(("none", True), ("layer", True)),
    ):
        options: dict[str, Any] = {"remat": option, "unroll": unroll, "act_quant": "none"}
        lora = LoraConfig(rank=2, dropout=0.4)
        definition, base = build(BITNET, lora=lora, **options)
        adapter = jax.tree.map(lambda a: a + 0.05, initialize_adapter(definition, 1))

        def loss(adapter: Any, base: Any, definition: DecoderDefinition = definition) -> jax.Array:
            decoder = definition.bind(base, adapter)
            hidden = decoder(*batch, key)
            return decoder.loss(hidden, sample(9), jnp.ones((B, T), jnp.float32))

        compiled = jax.jit(jax.grad(loss)).lower(adapter, base).compile()
        gradients.append(compiled(adapter, base))
        costs: Any = compiled.cost_analysis()
        operations[option, unroll] = costs["flops"]
    # Nothing that is to be recomputed is taken for what is there already.
    assert operations["layer", True] > 1.1 * operations["none", True]
    for kept, *recomputed in zip(*map(jax.tree.leaves, gradients), strict=True):
        bound = 2e-5 * float(jnp.abs(kept).max())
        for found in recomputed:
            np.testing.assert_allclose(found, kept, rtol=0, atol=bound)


def test_dropout_needs_a_key_and_differs_between_keys() -> None:
    definition, base = build(BITNET, lora=LoraConfig(rank=2, dropout=0.5))
    adapter = jax.tree.map(lambda a: a + 0.05, initialize_adapter(definition, 1))
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    arguments = (sample(8), positions, jnp.ones((B, T), jnp.int32))
    run = partial(forward_of(definition), base, adapter, *arguments)
    dropped = [run(jax.random.key(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert not np.array_equal(dropped[0], dropped[2])
    plain = run()
    assert float(jnp.abs(plain - dropped[0]).max()) > 0.01


def test_compiled_size_does_not_grow_with_depth() -> None:
    texts = []
    for layers in (2, 12):
        definition = define_decoder(replace(BITNET, num_layers=layers), DecoderOptions())
        base = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), _plain(definition.base)
        )
        ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
        run = jax.jit(lambda base, *ids, d=definition: d.bind(base, {})(*ids))
        texts.append(run.lower(base, ids, ids, ids).as_text())
    assert abs(len(texts[1]) - len(texts[0])) < 0.05 * len(texts[0])


def _plain(state: Any) -> Any:
    from flax import nnx

    return nnx.to_pure_dict(state)
