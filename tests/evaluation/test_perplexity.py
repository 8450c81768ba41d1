"""Perplexity against float64 sums over whole logits."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fabric_jax.data.batch import Batch
from fabric_jax.errors import FabricError
from fabric_jax.evaluation.perplexity import Perplexity, evaluate_perplexity, make_eval_step
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.initialize import initialize_base
from fabric_jax.models.registry import get_config

CONFIG = dataclasses.replace(
    get_config("bitnet-tiny"), num_layers=2, hidden_size=32, ffn_size=48, num_heads=2,
    num_kv_heads=2, head_dim=16, vocab_size=50,
)  # fmt: skip


def random_batch(seed: int, trained: float) -> Batch:
    noise, shape = np.random.default_rng(seed), (2, 12)
    segments = np.sort(noise.integers(0, 3, shape))[:, ::-1]
    mask = (noise.random(shape) < trained) & (segments > 0)
    return Batch(
        tokens=noise.integers(0, 50, shape).astype(np.int32),
        targets=noise.integers(0, 50, shape).astype(np.int32),
        loss_mask=mask.astype(np.float32),
        segment_ids=np.ascontiguousarray(segments, np.int32),
        positions=np.broadcast_to(np.arange(12, dtype=np.int32), shape),
    )


@pytest.fixture(scope="module")
def model():
    definition = define_decoder(CONFIG, DecoderOptions())
    base = initialize_base(definition, 0)
    base["embedding"] *= jnp.float32(30)
    return definition, base


def test_every_token_weighs_the_same(model):
    definition, base = model
    batches = [random_batch(seed, trained) for seed, trained in enumerate([0.9, 0.1, 0.0, 0.5])]
    total, count = 0.0, 0
    decoder = definition.bind(base, {})
    for batch in batches:
        arrays = jax.tree.map(jnp.asarray, batch)
        hidden = decoder(arrays.tokens, arrays.positions, arrays.segment_ids)
        logits = np.asarray(decoder.logits(hidden), np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        chosen = np.take_along_axis(log_p, np.asarray(batch.targets)[..., None], -1)[..., 0]
        total -= (chosen * batch.loss_mask).sum()
        count += int(batch.loss_mask.sum())
    result = evaluate_perplexity(make_eval_step(definition), base, {}, batches)
    assert result.tokens == count
    assert result.loss == pytest.approx(total / count, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)


def test_sums_of_batches_are_float64():
    """Float32 would lose every increment of 1 beyond 2^24."""

    def step(base, adapter, batch):
        return jnp.float32(batch), jnp.float32(batch)

    batches = [2.0**24, *[1.0] * 1000]
    result = evaluate_perplexity(step, {}, {}, batches)
    assert result.tokens == 2**24 + 1000
    assert result.loss == 1.0


def test_overflow_is_infinite():
    assert Perplexity(loss=1e4, tokens=1).perplexity == math.inf


def test_no_trainable_token_is_an_error(model):
    definition, base = model
    with pytest.raises(FabricError, match="no trainable token"):
        evaluate_perplexity(make_eval_step(definition), base, {}, [random_batch(0, 0.0)])
