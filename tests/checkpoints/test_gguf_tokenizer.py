"""Tokenizers into GGUF metadata and back."""

import json
from pathlib import Path

import gguf
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from fabric_jax.checkpoints.gguf.read import open_gguf
from fabric_jax.checkpoints.gguf.tokenizer_fields import tokenizer_fields
from fabric_jax.checkpoints.gguf.write import write_gguf
from fabric_jax.data.gguf_vocabulary import PRE_TOKENIZERS, build_gguf_vocabulary
from fabric_jax.data.sentencepiece_bpe import Pieces, build_sentencepiece_bpe
from fabric_jax.data.tokenizer import load_tokenizer
from fabric_jax.errors import FabricError
from tests.checkpoints.gguf_files import QWEN3, tree_source
from tests.data.test_tokenizer import TEXTS, train_bpe

SPACE = "\u2581"


def sentencepiece_folder(folder: Path, *, adds_space: bool = True) -> Path:
    """A small SentencePiece vocabulary as transformers keeps it, in tokenizer.json."""
    words = ["the", "there", "in", "ing", "er", "on", "and", "12", "drug", "tr", "ee"]
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    types = [2, 3, 3] + [6] * 256
    grown = {word[:end] for word in words for end in range(2, len(word) + 1)}
    grown |= {word[end:] for word in words for end in range(len(word) - 1)}
    grown |= {SPACE + word for word in words} | {SPACE * 2, SPACE + "t", SPACE + "th"}
    merged = sorted((word for word in grown if len(word) > 1), key=lambda w: (len(w), w))
    letters = sorted(set("".join(words)) | {SPACE} | set("abcdefghijklmnopqrstuvwxyz."))
    pieces += merged + letters
    types += [1] * (len(merged) + len(letters))
    scores = [-float(i) for i in range(len(pieces))]
    vocabulary = Pieces(tokens=pieces, scores=scores, types=types, add_prefix_space=adds_space)
    backend = build_sentencepiece_bpe(vocabulary, folder)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def values_of(source: Path | str, size: int) -> dict[str, object]:
    return {key: field.value for key, field in tokenizer_fields(str(source), size).items()}


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_byte_level_bpe(tmp_path: Path, pre: str) -> None:
    train_bpe(tmp_path, PRE_TOKENIZERS[pre])
    settings = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "chat_template": "{{ messages }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    if pre == "qwen2":
        backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        backend.normalizer = normalizers.NFC()
        backend.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    values = values_of(tmp_path, ours.vocab_size + 7)
    assert values["tokenizer.ggml.model"] == "gpt2"
    assert PRE_TOKENIZERS[str(values["tokenizer.ggml.pre"])] == PRE_TOKENIZERS[pre]
    found = build_gguf_vocabulary(values, "w")
    for text in [*TEXTS, "<|bos|>hi<|eot|>"]:
        assert found.backend.encode(text, add_special_tokens=False).ids == ours.encode(text)
    assert (found.bos_id, found.eos_id, found.stop_ids) == (0, 1, (1, 2))
    assert found.add_bos == ours.add_bos
    assert found.chat_template == "{{ messages }}"
    assert found.vocab_size == ours.vocab_size + 7
    types = values["tokenizer.ggml.token_type"]
    assert types[:3] == [3, 3, 3]
    assert types[-7:] == [5] * 7


@pytest.mark.parametrize("adds_space", [True, False])
def test_sentencepiece(tmp_path: Path, adds_space: bool) -> None:
    ours = load_tokenizer(sentencepiece_folder(tmp_path, adds_space=adds_space))
    values = values_of(tmp_path, ours.vocab_size)
    assert values["tokenizer.ggml.model"] == "llama"
    assert values["tokenizer.ggml.add_space_prefix"] is adds_space
    types = values["tokenizer.ggml.token_type"]
    assert (types[:3], set(types[3:259])) == ([2, 3, 3], {6})
    found = build_gguf_vocabulary(values, "w")
    for text in [*TEXTS, "the drug there  tree 12 and", "<s>the</s>"]:
        assert found.backend.encode(text, add_special_tokens=False).ids == ours.encode(text)
    assert (found.bos_id, found.eos_id, found.add_bos) == (1, 2, True)


def test_real_sentencepiece_vocabulary(tmp_path: Path, shared_data: Path) -> None:
    """Through tokenizer.json: ids as before, scores in the same order where they matter."""
    vocabulary = shared_data / "vocab" / "llama-spm.gguf"
    theirs = load_tokenizer(vocabulary)
    theirs.backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    values = values_of(tmp_path, 32_002)
    found = build_gguf_vocabulary(values, "w")
    rows = (shared_data / "biomedqa" / "train.jsonl").read_text().splitlines()[:40]
    for text in [*TEXTS, *(json.loads(row)["text"] for row in rows)]:
        assert found.backend.encode(text, add_special_tokens=False).ids == theirs.encode(text)
    fields = gguf.GGUFReader(vocabulary).fields
    assert values["tokenizer.ggml.tokens"][:32_000] == fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert values["tokenizer.ggml.token_type"][:32_000] == kinds
    # As they are when they come from a GGUF file.
    copied = values_of(vocabulary, 32_000)
    for key in ("tokens", "scores", "token_type"):
        name = f"tokenizer.ggml.{key}"
        assert copied[name] == fields[name].contents()


def test_models_carry_their_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "spm"
    ours = load_tokenizer(sentencepiece_folder(folder))
    config = QWEN3.from_dict(QWEN3.to_dict() | {"vocab_size": ours.vocab_size + 3})
    source = tree_source(config, tokenizer_source=str(folder))
    write_gguf(tmp_path / "m.gguf", source, kind="F16")
    found = open_gguf(tmp_path / "m.gguf")
    assert found.tokenizer_source == str(tmp_path / "m.gguf")
    # And once more, copied from the file.
    again = tree_source(config, tokenizer_source=found.tokenizer_source)
    write_gguf(tmp_path / "again.gguf", again, kind="F16")
    first, second = (load_tokenizer(tmp_path / name) for name in ("m.gguf", "again.gguf"))
    assert first.fingerprint == second.fingerprint
    for text in TEXTS:
        assert first.encode(text, add_special=True) == ours.encode(text, add_special=True)


def test_tokenizers_that_gguf_has_not(tmp_path: Path) -> None:
    split = r"\d|\w+|\W+"
    with pytest.raises(FabricError, match="splits words in a way that has no name in GGUF"):
        tokenizer_fields(str(train_bpe(tmp_path, split)), 600)
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(FabricError, match="expected a BPE vocabulary; found WordLevel"):
        tokenizer_fields(str(tmp_path / "tokenizer.json"), 600)
    path = train_bpe(tmp_path, None)
    size = load_tokenizer(path).vocab_size
    with pytest.raises(FabricError, match=f"has {size} tokens, the model only 100"):
        tokenizer_fields(str(path), 100)


def test_rules_that_gguf_can_not_hold(tmp_path: Path) -> None:
    """A lower-casing normaliser has no field; the probe finds that ids differ."""
    path = train_bpe(tmp_path, None)
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.normalizer = normalizers.Lowercase()
    backend.save(str(path))
    with pytest.raises(FabricError, match="has rules that GGUF can't hold"):
        tokenizer_fields(str(path), 600)


def test_metaspace_and_user_defined_tokens(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(sentencepiece_folder(tmp_path) / "tokenizer.json"))
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    values = values_of(tmp_path, 600)
    assert values["tokenizer.ggml.add_space_prefix"] is True
    number = values["tokenizer.ggml.tokens"].index("<tool>")
    assert values["tokenizer.ggml.token_type"][number] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [1, 2]}, "tokens in w is no list of str"),
        ({"scores": ["a"]}, "scores in w is no list of float"),
        ({"tokens": "abc"}, "tokens in w is no list of str"),
        ({"scores": [0.0]}, "inconsistent"),
        ({"bos_token_id": 10**6}, "bos_token_id in w is out of range"),
        ({"model": 3}, "unknown vocabulary kind in w '3'"),
        ({"token_type": [1] * 400}, "inconsistent|has no unknown piece"),
    ],
    ids=lambda value: "",
)
def test_bad_vocabularies(tmp_path: Path, change: dict[str, object], message: str) -> None:
    values = values_of(sentencepiece_folder(tmp_path), 400)
    values |= {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(FabricError, match=message):
        build_gguf_vocabulary(values, "w")  # pyright: ignore[reportArgumentType]


def test_a_token_of_a_thousand_characters(tmp_path: Path) -> None:
    values = values_of(sentencepiece_folder(tmp_path), 400)
    values["tokenizer.ggml.tokens"][300] = "x" * 5000
    with pytest.raises(FabricError, match="a token of 5000 characters"):
        build_gguf_vocabulary(values, "w")  # pyright: ignore[reportArgumentType]
