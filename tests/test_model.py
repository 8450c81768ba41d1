"""The Python surface: a model is loaded, read out, continued."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models

from fabric_jax.checkpoints.native import save_model
from fabric_jax.checkpoints.peft import save_adapter
from fabric_jax.data.tokenizer import Tokenizer, byte_tokenizer
from fabric_jax.errors import FabricError
from fabric_jax.generation.generator import Generator
from fabric_jax.generation.session import Generated
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.model import Model, load_model
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.initialize import initialize_adapter, initialize_base
from fabric_jax.models.registry import get_config

CONFIG = dataclasses.replace(
    get_config("bitnet-tiny"), name="smaller", num_layers=2, hidden_size=48, ffn_size=32,
    num_heads=2, num_kv_heads=1, head_dim=24, max_length=64,
)  # fmt: skip
BYTES = byte_tokenizer()
TOKENS = np.array([[257, 72, 105], [257, 1, 255]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved model and an adapter for it that changes what it says."""
    root = tmp_path_factory.mktemp("saved")
    options = DecoderOptions(lora=LoraConfig(rank=2, alpha=4.0))
    definition = define_decoder(CONFIG, options)
    base = initialize_base(definition, 3)
    base["embedding"] *= jnp.float32(30)
    noise = np.random.default_rng(3)
    adapter = jax.tree.map(
        lambda x: jnp.asarray(noise.normal(0, 0.5, x.shape), jnp.float32),
        initialize_adapter(definition, 3),
    )
    save_model(root / "model", definition, base, tokenizer_json=None)
    save_adapter(root / "adapter", definition, adapter, "smaller")
    decoder = definition.bind(base, adapter)
    positions = jnp.broadcast_to(jnp.arange(3, dtype=jnp.int32)[None], (2, 3))
    tokens = jnp.asarray(TOKENS, jnp.int32)
    logits = decoder.logits(decoder(tokens, positions, jnp.ones_like(tokens)))
    return root / "model", root / "adapter", np.asarray(logits)


@pytest.fixture(scope="module")
def model(folders) -> Model:
    return load_model(folders[0])


@pytest.fixture(scope="module")
def adapted(folders) -> Model:
    return load_model(folders[0], adapter=folders[1])


def test_a_registry_name_gives_packed_random_weights():
    first, again, other = (load_model("bitnet-tiny", seed=seed) for seed in (1, 1, 2))
    assert first.config == get_config("bitnet-tiny")
    assert first.adapter == {}
    weight = first.frozen["layers"]["attention"]["q"]["weight"]
    assert weight.dtype == jnp.uint8
    np.testing.assert_array_equal(weight, again.frozen["layers"]["attention"]["q"]["weight"])
    assert not np.array_equal(weight, other.frozen["layers"]["attention"]["q"]["weight"])


def test_weights_and_dtype_choose_the_form():
    model = load_model("bitnet-tiny", weights="master", dtype="bfloat16")
    assert model.frozen["layers"]["attention"]["q"]["weight"].dtype == jnp.float32
    assert model.frozen["embedding"].dtype == jnp.bfloat16
    assert model.definition.options.act_quant == "per_token"


def test_logits_of_a_saved_model_with_its_adapter(adapted, folders):
    logits = adapted.logits(TOKENS)
    assert logits.shape == (2, 3, CONFIG.vocab_size)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, folders[2], rtol=1e-4, atol=1e-4)


def test_the_adapter_changes_the_model(model, adapted):
    assert model.adapter == {}
    assert np.abs(np.asarray(model.logits(TOKENS) - adapted.logits(TOKENS))).max() > 0.1


def test_generated_tokens_are_the_likeliest(adapted):
    prompt = "Hello"
    completion = adapted.generate(prompt, max_new_tokens=8, stop_tokens=())[0]
    ids = [BYTES.bos_id, *prompt.encode(), *completion.tokens]
    logits = np.asarray(adapted.logits(np.array([ids])))[0]
    assert list(completion.tokens) == logits.argmax(-1)[len(prompt) : -1].tolist()
    assert completion.finish == "length"


def test_every_kind_of_prompt(adapted):
    chat = [{"role": "user", "content": "Hi"}]
    prompts = ["Hi", [257, 72, 105], chat]
    text, ids, chatted = adapted.generate(prompts, max_new_tokens=8)
    assert text == ids
    assert chatted.tokens != text.tokens
    assert adapted.generate("Hi", max_new_tokens=8)[0] == text
    assert adapted.generate(prompts, max_new_tokens=8, batch_size=2) == [text, ids, chatted]


def test_stop_tokens_default_to_the_tokenizers(adapted):
    free = adapted.generate("Hello", max_new_tokens=8, stop_tokens=())[0]
    stop = free.tokens[3]
    tokenizer = dataclasses.replace(BYTES, stop_ids=(stop,))
    for options in ({"tokenizer": tokenizer}, {"stop_tokens": [stop]}):
        stopped = adapted.generate("Hello", max_new_tokens=8, **options)[0]
        end = free.tokens.index(stop)
        assert stopped.finish == "stop"
        assert stopped.tokens == free.tokens[: end + 1]
        assert stopped.text == BYTES.decode(free.tokens[:end], skip_special=True)


def test_sampling_is_seeded(adapted):
    options = {"max_new_tokens": 8, "temperature": 1.0, "top_k": 50, "top_p": 0.95}
    first = adapted.generate("Hello", seed=1, **options)
    assert first == adapted.generate("Hello", seed=1, **options)
    assert first != adapted.generate("Hello", seed=2, **options)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2], r"integers of shape \[B, T\]; found int64 of shape \[2\]"),
        ([[1.0]], "found float64"),
        (np.zeros((1, 0), np.int32), "shape"),
        (
            np.zeros((1, 65), np.int32),
            "65 tokens are more than smaller allows; expected at most 64",
        ),
        ([[0, 260]], "outside the model's vocabulary; expected 0 to 259; found 260"),
        ([[-1]], "found -1"),
    ],
    ids=["flat", "floats", "empty", "long", "id", "negative"],
)
def test_logits_refuses_what_it_cannot_read(model, tokens, message):
    with pytest.raises(FabricError, match=message):
        model.logits(tokens)


def test_generate_refuses_what_does_not_fit(model):
    with pytest.raises(FabricError, match=r"prompt 1 has 61 tokens.*64 positions.*smaller allows"):
        model.generate(["a", "b" * 60], max_new_tokens=8)
    with pytest.raises(FabricError, match="temperature is out of range"):
        model.generate("a", temperature=-1.0)
    with pytest.raises(FabricError, match="given as a list"):
        model.generate([257, 72])


def test_an_adapter_of_another_model_is_refused(folders):
    with pytest.raises(FabricError, match="does not fit bitnet-tiny"):
        load_model("bitnet-tiny", adapter=folders[1])
    with pytest.raises(FabricError, match="does not exist"):
        load_model(folders[0], adapter=folders[0].parent / "nothing")


def test_unknown_models_are_refused():
    with pytest.raises(FabricError, match="Did you mean 'bitnet-tiny'"):
        load_model("bitnet-tinny")


def test_a_stream_is_the_answer_in_pieces(adapted):
    whole = adapted.generate("Hello", max_new_tokens=24, stop_tokens=())[0]
    stream = adapted.stream("Hello", max_new_tokens=24, stop_tokens=())
    pieces = list(stream)
    assert "".join(pieces) == whole.text
    assert stream.completion == whole
    assert stream.stats is not None
    assert (stream.stats.prompt_tokens, stream.stats.new_tokens) == (6, 24)
    assert 0 < stream.stats.prefill_seconds < stream.stats.first_token_seconds
    for _ in (left := adapted.stream("Hello", max_new_tokens=24, stop_tokens=())):
        break
    assert left.completion is not None
    assert left.completion.finish == "interrupted"
    assert whole.tokens[: len(left.completion.tokens)] == left.completion.tokens


def byte_fallback() -> Tokenizer:
    """Bytes as vocabularies of SentencePiece spell them; runs of them are decoded together."""
    words = {f"<0x{byte:02X}>": byte for byte in range(256)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=words, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return dataclasses.replace(BYTES, backend=backend, add_bos=False, vocab_size=256)


def test_a_character_that_is_cut_off_takes_no_other_with_it(adapted, monkeypatch):
    def generated(*_, **__):
        return [Generated(tokens=tuple("né😀".encode()[:-1]), finish="length")]

    whole = adapted.generate("Q:", tokenizer=byte_fallback(), max_new_tokens=24, stop_tokens=())[0]
    stream = adapted.stream("Q:", tokenizer=byte_fallback(), max_new_tokens=24, stop_tokens=())
    assert "".join(stream) == whole.text
    assert stream.completion == whole
    monkeypatch.setattr(Generator, "__call__", generated)
    assert adapted.generate("Q:", tokenizer=byte_fallback())[0].text == "né\ufffd\ufffd\ufffd"


def test_stop_strings_are_cut(adapted, monkeypatch):
    free = adapted.generate("Hello", max_new_tokens=24, stop_tokens=())[0]
    ascii_at = next(i for i in range(3, len(free.text)) if free.text[i].isascii())
    stop = free.text[ascii_at]
    expected = free.text[: free.text.index(stop)]
    options = {"max_new_tokens": 24, "stop_tokens": (), "stop_strings": [stop]}
    stopped = adapted.generate(["Hello", "Hello"], log_probs=True, **options)[1]
    assert (stopped.text, stopped.finish) == (expected, "stop")
    assert len(stopped.log_probs) == len(stopped.tokens) < 24
    # A dispatch takes as many steps as it likes: what lies behind the stop is no part of an answer.
    monkeypatch.setattr("fabric_jax.model.PIECE_SECONDS", 1e9)
    stream = adapted.stream("Hello", log_probs=True, **options)
    assert "".join(stream) == expected
    assert stream.completion.finish == "stop"
    assert stream.completion.tokens == stopped.tokens
    assert stream.completion.log_probs == pytest.approx(stopped.log_probs, abs=1e-5)
    with pytest.raises(FabricError, match="stop strings are a list"):
        adapted.generate("Hello", stop_strings="a")


def test_each_prompt_may_have_an_adapter_of_its_own(folders, model, adapted):
    name = str(folders[1])
    several = load_model(folders[0], adapter=[folders[1]])
    options = {"max_new_tokens": 6, "stop_tokens": ()}
    found = several.generate(["Hello", "Hello"], adapters=[None, name], **options)
    alone = [one.generate("Hello", **options)[0] for one in (model, adapted)]
    assert alone[0].tokens != alone[1].tokens
    # Codes of activations may round the other way; a wrong adapter would differ from the start.
    for ours, theirs in zip(found, alone, strict=True):
        assert ours.tokens[:2] == theirs.tokens[:2]
    assert "".join(several.stream("Hello", adapter=name, **options)) == found[1].text
    with pytest.raises(FabricError, match="unknown adapter 'none'"):
        several.generate("Hello", adapters="none")
    with pytest.raises(FabricError, match="one adapter for each prompt"):
        several.generate(["a", "b"], adapters=[name])
    with pytest.raises(FabricError, match="not loaded with several adapters"):
        model.generate("a", adapters=name)
    with pytest.raises(FabricError, match="logits are those of one adapter"):
        several.logits(TOKENS)
