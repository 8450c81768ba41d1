"""Two models side by side against numbers derived in float64."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fabric_jax.data.batch import Batch
from fabric_jax.errors import FabricError
from fabric_jax.evaluation.divergence import BLOCK, Run, measure_divergence
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.initialize import initialize_base

SMALL = ModelConfig(
    name="small",
    vocab_size=61,
    num_layers=1,
    hidden_size=32,
    ffn_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_length=64,
    tied_head=False,
)
ROWS, LENGTH = 2, 25


def batch() -> Batch:
    random = np.random.default_rng(0)
    tokens = random.integers(0, SMALL.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    mask = (random.random((ROWS, LENGTH)) < 0.8).astype(np.float32)
    row = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
    return Batch(
        tokens=jnp.asarray(tokens[:, :-1]),
        targets=jnp.asarray(tokens[:, 1:]),
        loss_mask=jnp.asarray(mask),
        segment_ids=jnp.ones((ROWS, LENGTH), jnp.int32),
        positions=jnp.asarray(row),
    )


def run_of(seed: int, packing: str = "ternary2") -> Run:
    definition = define_decoder(SMALL, DecoderOptions(packing=packing))
    base = initialize_base(definition, seed)
    base["head"] *= jnp.float32(20)
    return Run(definition, base, {})


def log_probs(run: Run, given: Batch) -> np.ndarray:
    @jax.jit
    def logits(base):
        decoder = run.definition.bind(base, {})
        return decoder.logits(decoder(given.tokens, given.positions, given.segment_ids))

    values = np.asarray(logits(run.base), np.float64)
    return values - np.log(np.exp(values).sum(-1, keepdims=True))


def test_figures_are_those_of_the_definitions():
    first, second, given = run_of(1), run_of(2), batch()
    found = measure_divergence(first, second, [given, given])
    p, q = log_probs(first, given), log_probs(second, given)
    counted = np.asarray(given.loss_mask) > 0
    kl = np.sum(np.exp(p) * (p - q), -1)[counted]
    assert found.positions == 2 * counted.sum() > BLOCK
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-4)
    assert found.kl_median == pytest.approx(np.median(kl), rel=1e-4)
    assert found.kl_max == pytest.approx(kl.max(), rel=1e-4)
    assert found.kl_p99 == pytest.approx(np.quantile(np.tile(kl, 2), 0.99), rel=1e-4)
    same = (p.argmax(-1) == q.argmax(-1))[counted]
    assert found.top1_agreement == pytest.approx(same.mean())
    assert found.disagreements == 2 * (~same).sum()
    chosen = np.take_along_axis(p, np.asarray(given.targets)[..., None], -1)[..., 0][counted]
    assert found.perplexity_first == pytest.approx(np.exp(-chosen.mean()), rel=1e-5)
    assert found.to_dict()["perplexity_ratio"] == pytest.approx(
        found.perplexity_second / found.perplexity_first
    )


def test_layouts_of_the_same_integers_do_not_diverge():
    found = measure_divergence(run_of(1), run_of(1, "ternary1.6"), [batch()])
    assert (found.kl_max, found.top1_agreement, found.perplexity_ratio) == (0, 1, 1)


def test_what_cannot_be_compared_is_refused():
    given, first = batch(), run_of(1)
    nothing = replace(given, loss_mask=jnp.zeros_like(given.loss_mask))
    with pytest.raises(FabricError, match="no trainable token"):
        measure_divergence(first, first, [nothing])
    other = define_decoder(replace(SMALL, vocab_size=60), DecoderOptions())
    with pytest.raises(FabricError, match="different vocabularies"):
        measure_divergence(first, Run(other, initialize_base(other, 0), {}), [given])
