"""The decode loop against full re-runs of the model, one prompt at a time."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fabric_jax.errors import FabricError
from fabric_jax.generation import programs
from fabric_jax.generation.config import GenerationConfig
from fabric_jax.generation.generator import Generator, bucket, make_generator
from fabric_jax.generation.sampling import sampling_of
from fabric_jax.generation.state import Weights
from fabric_jax.layers.kv_cache import empty_cache
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderDefinition, DecoderOptions, define_decoder
from fabric_jax.models.initialize import initialize_adapter, initialize_base

SMALL = ModelConfig(
    name="small",
    vocab_size=97,
    num_layers=2,
    hidden_size=32,
    ffn_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_length=64,
    tied_head=False,
)
PROMPTS = [[5, 17, 3], [96, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [42], [7, 7, 7, 7, 7, 7]]
NEW = 12


class Model:
    """A definition with random weights that make varied text."""

    def __init__(self, mode: str, dtype: str = "float32", rank: int = 0):
        options = DecoderOptions(mode=mode, dtype=dtype, lora=LoraConfig(rank=rank))
        self.definition: DecoderDefinition = define_decoder(SMALL, options)
        self.base = initialize_base(self.definition, 3)
        self.base["embedding"] *= jnp.asarray(50, dtype)
        adapter = initialize_adapter(self.definition, 3)
        noise = np.random.default_rng(0)
        self.adapter = jax.tree.map(
            lambda x: jnp.asarray(noise.normal(0, 0.3, x.shape), x.dtype), adapter
        )
        self.generator: Generator = make_generator(self.definition)
        self.weights = Weights(base=self.base, adapter=self.adapter)
        self.next_token = jax.jit(self._next_token)

    def __call__(self, prompts, watch=None, **numbers):
        # One capacity for all tests, so that they share what was compiled.
        settings = GenerationConfig(**{"max_new_tokens": NEW, "cache_length": 32, **numbers})
        return self.generator(self.base, self.adapter, prompts, settings, watch=watch)

    def _next_token(self, tokens, length):
        decoder = self.definition.bind(self.base, self.adapter)
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        hidden = decoder(tokens, positions, jnp.ones_like(tokens))
        return jnp.argmax(decoder.logits(hidden)[0, length - 1])


@cache
def shared_model(mode: str, rank: int) -> Model:
    return Model(mode, rank=rank)


@pytest.fixture(params=["packed", "float", "packed-lora"])
def model(request) -> Model:
    mode, _, lora = request.param.partition("-")
    return shared_model(mode, 4 if lora else 0)


@pytest.fixture
def packed() -> Model:
    return shared_model("packed", 0)


def greedy_by_rerunning(model: Model, prompt: list[int], new: int) -> list[int]:
    """The whole sequence through the model again for each token, no cache."""
    sequence = list(prompt)
    for _ in range(new):
        row = np.zeros((1, SMALL.max_length), np.int32)
        row[0, : len(sequence)] = sequence
        sequence.append(int(model.next_token(jnp.asarray(row), len(sequence))))
    return sequence[len(prompt) :]


def test_greedy_equals_rerunning_the_sequence(model):
    for prompt, result in zip(PROMPTS, model(PROMPTS), strict=True):
        assert list(result.tokens) == greedy_by_rerunning(model, prompt, NEW)
        assert result.finish == "length"


def test_random_models_write_varied_text(model):
    results = [result.tokens for result in model(PROMPTS)]
    assert len(set(results)) == len(results)
    assert max(len(set(tokens)) for tokens in results) > 3


@pytest.mark.parametrize(
    ("temperature", "batch_size"), [(0.0, 1), (1.0, 3)], ids=["greedy-1", "sampled-3"]
)
def test_results_do_not_depend_on_the_batch(packed, temperature, batch_size):
    together = packed(PROMPTS, temperature=temperature, seed=5)
    assert together == packed(PROMPTS, temperature=temperature, seed=5, batch_size=batch_size)


def test_sampling_depends_on_seed_and_row_alone(packed):
    same = [PROMPTS[0]] * len(PROMPTS)
    first = packed(same, temperature=1.0, seed=1)
    assert first == packed(same, temperature=1.0, seed=1)
    assert first != packed(same, temperature=1.0, seed=2)
    assert len({result.tokens for result in first}) == len(same)


def test_more_tokens_continue_fewer(packed):
    short = packed(PROMPTS, temperature=1.0, max_new_tokens=3)
    long = packed(PROMPTS, temperature=1.0, max_new_tokens=9)
    for a, b in zip(short, long, strict=True):
        assert b.tokens[:3] == a.tokens


def test_steps_between_looks_change_no_result(packed, monkeypatch):
    """As on GPUs: before the limit, at it, and where all rows have ended between two looks."""
    monkeypatch.setattr(programs, "steps_between_looks", lambda: 4)
    several = Model("packed")
    for new in (3, 4, 9):
        assert several(PROMPTS, max_new_tokens=new) == packed(PROMPTS, max_new_tokens=new)
    free = packed(PROMPTS[:1])[0].tokens
    options = {"stop_tokens": (free[5],), "seed": 7, "repetition_penalty": 1.3, "log_probs": True}
    assert several(PROMPTS[:1], **options) == packed(PROMPTS[:1], **options)
    assert several(PROMPTS, watch=lambda *_: False) == packed(PROMPTS)


def test_stop_tokens_end_a_row_and_only_it(packed):
    free = packed(PROMPTS)
    stop = free[0].tokens[4]
    at = free[0].tokens.index(stop)
    results = packed(PROMPTS, stop_tokens=(stop, SMALL.vocab_size - 1))
    assert results[0].tokens == free[0].tokens[: at + 1]
    assert results[0].finish == "stop"
    assert results[0].answer == free[0].tokens[:at]
    for with_stop, without in zip(results, free, strict=True):
        ends = [i for i, t in enumerate(without.tokens) if t in (stop, SMALL.vocab_size - 1)]
        expected = without.tokens[: ends[0] + 1] if ends else without.tokens
        assert with_stop.tokens == expected
        assert with_stop.finish == ("stop" if ends else "length")


def test_loop_ends_when_every_row_is_done(packed):
    first = packed(PROMPTS[:1])[0].tokens[0]
    state, step = start(packed, PROMPTS[:1]), step_of(packed)
    state = step(state, limit=10, stops=[first])
    assert int(state.step) == 1
    assert bool(state.done[0])


def test_decode_can_be_continued(packed):
    step = step_of(packed)
    at_once = step(start(packed, PROMPTS), limit=NEW)
    in_parts = step(start(packed, PROMPTS), limit=5)
    in_parts = step(in_parts, limit=NEW)
    np.testing.assert_array_equal(at_once.generated, in_parts.generated)
    np.testing.assert_array_equal(at_once.cache.keys, in_parts.cache.keys)
    assert [list(result.tokens) for result in packed(PROMPTS)] == np.asarray(in_parts.generated)[
        :, :NEW
    ].tolist()


def start(model: Model, prompts):
    tokens = np.zeros((len(prompts), 16), np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)] = prompt
    lengths = jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)
    cache = empty_cache(
        SMALL.num_layers,
        len(prompts),
        32,
        SMALL.num_kv_heads,
        SMALL.head_dim,
        model.generator.dtype,
    )
    starts = jnp.zeros_like(lengths)
    return model.generator.prefill(
        model.weights, cache, jnp.asarray(tokens), starts, lengths, None, slots=16, log_probs=False
    )


def decode_arguments(rows: int, limit: int, stops=()):
    sampling = sampling_of(GenerationConfig())[1]
    keys = jax.random.split(jax.random.key(0), rows)
    stops = jnp.asarray([*stops, -1], jnp.int32)
    return keys, sampling, stops, jnp.int32(limit), jnp.zeros(rows, jnp.bool_)


def step_of(model: Model):
    def step(state, limit, stops=()):
        rest = decode_arguments(state.last.shape[0], limit, stops)
        return model.generator.decode(model.weights, state, *rest, method="greedy")

    return step


def test_one_compilation_for_a_bucket():
    model = Model("packed")
    for prompts, numbers in [
        ([[4] * 9], {"max_new_tokens": 5}),
        ([[1]], {"stop_tokens": (3, 4), "max_new_tokens": 16, "seed": 9}),
        ([[6] * 16], {"max_new_tokens": 1, "stop_tokens": (1,)}),
    ]:
        model(prompts, **numbers)
    prefill, decode = model.generator.prefill, model.generator.decode
    assert len(prefill.compiled) == len(decode.compiled) == 1
    model([[1, 2]], temperature=0.5)
    model([[1, 2]], temperature=0.9, seed=3)
    assert len(prefill.compiled) == 1
    assert len(decode.compiled) == 2


def test_decode_updates_the_cache_in_place(packed):
    state = start(packed, PROMPTS)
    arguments = (packed.weights, state, *decode_arguments(len(PROMPTS), NEW))
    compiled = packed.generator.decode.function.lower(*arguments, method="greedy").compile()
    cache_bytes = state.cache.keys.nbytes + state.cache.values.nbytes
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    old = state.cache.keys
    packed.generator.decode(*arguments, method="greedy")
    assert old.is_deleted()


def test_bfloat16_cache_has_the_models_dtype():
    model = Model("packed", dtype="bfloat16")
    assert start(model, PROMPTS).cache.keys.dtype == jnp.bfloat16
    assert all(len(result.tokens) == NEW for result in model(PROMPTS))


def test_log_probs_are_those_of_a_full_run(packed):
    found = packed(PROMPTS, log_probs=True, temperature=0.8, seed=3)
    plain = packed(PROMPTS, temperature=0.8, seed=3)

    @jax.jit
    def log_probs(row):
        decoder = packed.definition.bind(packed.base, packed.adapter)
        hidden = decoder(row, jnp.arange(row.shape[1])[None], jnp.ones_like(row))
        return jax.nn.log_softmax(decoder.logits(hidden))[0]

    for prompt, result, without in zip(PROMPTS, found, plain, strict=True):
        assert (result.tokens, without.log_probs) == (without.tokens, None)
        row = np.zeros((1, 32), np.int32)
        row[0, : len(prompt) + NEW] = [*prompt, *result.tokens]
        whole = np.asarray(log_probs(jnp.asarray(row)))[len(prompt) - 1 :]
        expected = whole[np.arange(NEW), list(result.tokens)]
        # A code may round the other way: median and mean, as for logits elsewhere.
        assert np.median(np.abs(np.array(result.log_probs) - expected)) < 1e-3


def test_a_penalty_keeps_tokens_from_coming_again(packed):
    repeated = packed(PROMPTS, repetition_penalty=1e6)
    for prompt, result in zip(PROMPTS, repeated, strict=True):
        together = [*prompt, *result.tokens]
        assert len(set(result.tokens)) == len(result.tokens)
        assert len(set(together)) == len(set(prompt)) + len(result.tokens)


def test_int8_cache_is_close():
    """Mean divergence of the next token's distribution, in nats, after a prompt that is cached."""
    model = shared_model("packed", 4)

    @jax.jit
    def logits_of(cache):
        decoder = model.definition.bind(model.base, model.adapter)
        hidden, _ = decoder.extend(tokens, positions, cache)
        return decoder.logits(hidden)

    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 97, (6, 24)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(24, dtype=jnp.int32)[None], tokens.shape)
    scores = {}
    for dtype in ("float32", "bfloat16", "int8"):
        logits = np.asarray(logits_of(empty_cache(2, 6, 24, 2, 8, dtype)), np.float64)
        scores[dtype] = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    exact = scores["float32"]
    for dtype, most in (("bfloat16", 1e-2), ("int8", 1e-2)):
        kl = np.sum(np.exp(exact) * (exact - scores[dtype]), -1).mean()
        assert 0 < kl < most
    assert all(len(r.tokens) == NEW for r in model(PROMPTS, cache_dtype="int8"))


def test_a_session_continues_what_another_left(packed):
    settings = GenerationConfig(max_new_tokens=5, cache_length=64)
    arguments = (packed.base, packed.adapter)
    first = packed.generator.start(*arguments, PROMPTS[1], settings)
    first.advance(5)
    longer = [*PROMPTS[1], *first.tokens(0), 3, 9, 4]
    session = packed.generator.start(*arguments, longer, settings, cached=first.cached(PROMPTS[1]))
    assert session.stats.prompt_tokens == 4
    session.advance(2)
    session.advance(5)
    assert session.done
    assert list(session.tokens(0)) == greedy_by_rerunning(packed, longer, 5)


def test_rows_that_the_caller_ends_stop(packed):
    free = packed(PROMPTS, max_new_tokens=40, cache_length=64)
    stopped = packed(PROMPTS, watch=lambda i, tokens: i == 1, max_new_tokens=40, cache_length=64)
    assert stopped[1].finish == "interrupted"
    assert stopped[1].tokens == free[1].tokens[:1]
    assert [stopped[i] for i in (0, 2, 3)] == [free[i] for i in (0, 2, 3)]


def test_a_prompt_may_fill_the_model(packed):
    prompt = [3] * (SMALL.max_length - 2)
    result = packed([prompt], max_new_tokens=2, cache_length=0)[0]
    assert list(result.tokens) == greedy_by_rerunning(packed, prompt, 2)


def test_a_batch_is_no_larger_than_its_prompts(packed):
    # So many rows of cache would be terabytes.
    result = packed(PROMPTS[:1], batch_size=2**34)
    assert result == packed(PROMPTS[:1])


def test_no_prompts_give_no_results(packed):
    assert packed([]) == []


@pytest.mark.parametrize(
    ("prompts", "numbers", "message"),
    [
        ([[1], [2] * 60], {}, r"prompt 1 has 60 tokens.*64 positions.*small allows.*to 4 or less"),
        ([[2] * 80], {"max_new_tokens": 4}, r"80 tokens.*64 positions.*Shorten.*to 60"),
        ([[2] * 80], {"max_new_tokens": 99}, r"Shorten the prompt below 64 .*lower max_new_tokens"),
        ([[2] * 9], {"cache_length": 16}, r"16 positions that the cache holds.*to 7 or less"),
        ([[2]], {"cache_length": 65}, "cache of 65 positions.*at most 64"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 97]], {}, "outside the model's vocabulary.*0 to 96.*found 97"),
        ([[-1, 4]], {}, "found -1"),
    ],
    ids=["long", "too-long", "both", "cache", "cache-size", "empty", "id", "negative-id"],
)
def test_prompts_that_do_not_fit_are_refused(packed, prompts, numbers, message):
    with pytest.raises(FabricError, match=message):
        packed(prompts, **{"cache_length": 0, **numbers})


@pytest.mark.parametrize(
    ("length", "limit", "expected"),
    [(1, 64, 16), (16, 64, 16), (17, 64, 32), (33, 48, 48), (3, 8, 8)],
)
def test_bucket(length, limit, expected):
    assert bucket(length, limit) == expected
