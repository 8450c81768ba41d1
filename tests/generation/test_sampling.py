"""Sampling against float64 re-derivations and transformers' own filters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric_jax.errors import FabricError
from fabric_jax.generation.config import GenerationConfig
from fabric_jax.generation.sampling import (
    choose_tokens,
    filtered_scores,
    most_likely,
    penalize,
    sampling_of,
    token_log_probs,
)

VOCAB = 23
FILTERED = jax.jit(filtered_scores)


def random_logits(seed: int, rows: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (rows, VOCAB)).astype(np.float32)


def kept_tokens(logits: np.ndarray, **numbers) -> list[set[int]]:
    _, sampling = sampling_of(GenerationConfig(**numbers))
    scores = np.asarray(FILTERED(jnp.asarray(logits), sampling))
    return [set(np.flatnonzero(np.isfinite(row)).tolist()) for row in scores]


def expected_tokens(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> set[int]:
    """By repeated choice of the most likely token, float64."""
    probabilities = np.exp(logits.astype(np.float64) / temperature)
    chosen: list[int] = []
    candidates = sorted(range(VOCAB), key=lambda i: -logits[i])[: top_k or VOCAB]
    total = sum(probabilities[i] for i in candidates)
    for i in candidates:
        chosen.append(i)
        if sum(probabilities[j] for j in chosen) >= top_p * total:
            break
    return set(chosen)


@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.1, 5),
    top_k=st.integers(0, VOCAB + 5),
    top_p=st.floats(0.01, 0.99),
)
@settings(max_examples=60, deadline=None)
def test_filter_keeps_the_smallest_sufficient_set(seed, temperature, top_k, top_p):
    logits = random_logits(seed, rows=1)
    kept = kept_tokens(logits, temperature=temperature, top_k=top_k, top_p=top_p)[0]
    assert kept == expected_tokens(logits[0], temperature, top_k, top_p)


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(5, 1.0, 0.0), (0, 0.7, 0.0), (6, 0.6, 0.0), (0, 0.05, 0.0), (0, 1.0, 0.1), (9, 0.9, 0.2)],
    ids=["k", "p", "k-and-p", "one", "min", "all"],
)
@pytest.mark.oracle
def test_filter_equals_transformers(oracle, top_k, top_p, min_p):
    torch, transformers = oracle("torch", "transformers")
    logits, temperature = random_logits(7, rows=16), 1.7
    scores = torch.tensor(logits) / temperature
    if top_k:
        scores = transformers.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = transformers.TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = transformers.MinPLogitsWarper(min_p)(None, scores)
    theirs = [set(np.flatnonzero(np.isfinite(row)).tolist()) for row in scores.numpy()]
    numbers = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    assert kept_tokens(logits, temperature=temperature, **numbers) == theirs


@pytest.mark.parametrize("penalty", [1.3, 0.8])
@pytest.mark.oracle
def test_repetition_penalty_equals_transformers(oracle, penalty):
    torch, transformers = oracle("torch", "transformers")
    logits = random_logits(5, rows=4)
    before = np.random.default_rng(0).integers(0, VOCAB, (4, 9))
    process = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    theirs = process(torch.tensor(before), torch.tensor(logits)).numpy()
    seen = np.zeros((4, VOCAB), np.bool_)
    np.put_along_axis(seen, before, True, axis=1)
    _, sampling = sampling_of(GenerationConfig(repetition_penalty=penalty))
    ours = penalize(jnp.asarray(logits), jnp.asarray(seen), sampling)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_log_probabilities_are_those_of_the_whole_vocabulary():
    logits, tokens = random_logits(8, rows=4), np.array([0, 5, VOCAB - 1, 7])
    wide = logits.astype(np.float64)
    expected = wide[np.arange(4), tokens] - np.log(np.exp(wide).sum(1))
    found = token_log_probs(jnp.asarray(logits), jnp.asarray(tokens, jnp.int32))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "numbers",
    [{"temperature": 0.7}, {"temperature": 1.3, "top_k": 4}, {"temperature": 1.0, "top_p": 0.8}],
    ids=["temperature", "top-k", "top-p"],
)
def test_draws_follow_the_distribution(numbers):
    draws, logits = 20_000, random_logits(3, rows=1)[0]
    method, sampling = sampling_of(GenerationConfig(**numbers))
    keys = jax.random.split(jax.random.key(0), draws)
    tokens = choose_tokens(
        jnp.broadcast_to(jnp.asarray(logits)[None], (draws, VOCAB)), keys, sampling, method
    )
    allowed = expected_tokens(
        logits, numbers["temperature"], numbers.get("top_k", 0), numbers.get("top_p", 1.0)
    )
    expected = np.zeros(VOCAB)
    for i in allowed:
        expected[i] = np.exp(np.float64(logits[i]) / numbers["temperature"])
    expected /= expected.sum()
    shares = np.bincount(np.asarray(tokens), minlength=VOCAB) / draws
    assert set(np.flatnonzero(shares)) <= allowed
    error = np.sqrt(expected * (1 - expected) / draws)
    assert np.all(np.abs(shares - expected) <= 5 * error + 1e-9)


def test_temperature_zero_and_top_1_are_greedy():
    logits = random_logits(1, rows=8)
    keys = jax.random.split(jax.random.key(0), 8)
    for numbers in ({"temperature": 0.0}, {"temperature": 0.0, "top_p": 0.5}, {"top_k": 1}):
        method, sampling = sampling_of(GenerationConfig(**numbers))
        tokens = choose_tokens(jnp.asarray(logits), keys, sampling, method)
        assert method == "greedy"
        np.testing.assert_array_equal(tokens, logits.argmax(1))


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("temperature", [1e-9, 1e-38, 1e-60])
def test_the_smallest_temperatures_draw_the_most_likely(temperature, top_p):
    logits = 30 * random_logits(2, rows=8)
    keys = jax.random.split(jax.random.key(0), 8)
    numbers = GenerationConfig(temperature=temperature, top_p=top_p)
    method, sampling = sampling_of(numbers)
    tokens = choose_tokens(jnp.asarray(logits), keys, sampling, method)
    np.testing.assert_array_equal(tokens, logits.argmax(1))


@pytest.mark.parametrize("width", [1, 7, 16, 1000])
def test_the_most_likely_is_argmax_of_whatever_it_is_given(width):
    rng = np.random.default_rng(width)
    logits = rng.integers(-3, 3, (64, width)).astype(np.float32)  # Many are equal.
    for row, value in enumerate([np.nan, np.inf, -np.inf, -np.nan]):
        logits[row, rng.random(width) < 0.3] = value
        logits[4 + row] = value
    logits[8, ::2], logits[9, 1::2] = -0.0, -0.0
    np.testing.assert_array_equal(jax.jit(most_likely)(logits), logits.argmax(1))


def test_equal_logits_rank_by_id():
    assert kept_tokens(np.zeros((1, VOCAB), np.float32), temperature=1.0, top_k=3) == [{0, 1, 2}]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("batch_size", -1),
        ("cache_length", -1),
    ],
)
def test_numbers_out_of_range_are_refused(field, value):
    with pytest.raises(FabricError, match=f"{field} is out of range"):
        GenerationConfig(**{field: value})
