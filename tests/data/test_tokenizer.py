"""Vocabularies from bytes, Hugging Face folders and GGUF files."""

import json
import re
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from fabric_jax.data.gguf_vocabulary import PRE_TOKENIZERS
from fabric_jax.data.tokenizer import byte_alphabet, byte_tokenizer, load_tokenizer
from fabric_jax.errors import FabricError

TEXTS = [
    "Q: Does drug 12345 inhibit CYP3A4?\nA: Yes. It's what they'll say.",
    "  two leading spaces,   three inside\n\n\ttabs and trailing ",
    "naïve café, 東京, עברית, 🙂👍🏽 and e\u0301",
    "def f(x):\n    return x**2  # 100%",
    "DON'T we'Ve I'M 1234567 ½ ²",
]


def train_bpe(folder: Path, split: str | None, *, name: str = "tokenizer.json") -> Path:
    """A small byte-level BPE of the kind Llama 3 or GPT-2 use, as a tokenizer.json."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    if split is None:
        backend.pre_tokenizer = byte_level
    else:
        words = pre_tokenizers.Split(tokenizers.Regex(split), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|bos|>", "<|eos|>", "<|eot|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*TEXTS * 3], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    path = folder / name
    backend.save(str(path))
    return path


def write_gguf_bpe(path: Path, tokenizer_json: Path, pre: str | None) -> None:
    """The same vocabulary as llama.cpp's converter would write it."""
    model = json.loads(tokenizer_json.read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(
        [rule if isinstance(rule, str) else " ".join(rule) for rule in model["merges"]]
    )
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_eot_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


# Bytes


def test_byte_ids_are_the_bytes_of_utf8() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.encode("é\n") == [0xC3, 0xA9, 0x0A]
    assert tokenizer.encode("a", add_special=True) == [257, 97]
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (256, 257, 258)
    assert tokenizer.decode([257, 104, 105, 258]) == "<|bos|>hi<|eos|>"
    assert tokenizer.decode([257, 104, 105, 258], skip_special=True) == "hi"


@settings(max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_bytes_round_trip_any_text(text: str) -> None:
    tokenizer = byte_tokenizer()
    if "<|" in text:
        return
    encoded = tokenizer.encode_with_offsets(text)
    assert encoded.ids.tolist() == list(text.encode())
    assert tokenizer.decode(encoded.ids.tolist()) == text
    for (start, end), byte in zip(encoded.offsets.tolist(), text.encode(), strict=True):
        assert end == start + 1
        assert byte in text[start].encode()


@pytest.mark.oracle
@pytest.mark.parametrize("method", ["encode", "encode_with_offsets", "encode_batch"])
def test_half_of_a_surrogate_pair_is_one_message(method: str) -> None:
    # What a cut-off "\\ud83d\\ude00" in JSON becomes.
    text = json.loads('"one \\ud83d"')
    with pytest.raises(FabricError, match=r"half of a surrogate pair.*'one \\ud83d'"):
        getattr(byte_tokenizer(), method)(["two", text] if method == "encode_batch" else text)


def test_byte_alphabet_equals_gpt2s(oracle) -> None:
    (module,) = oracle("transformers.convert_slow_tokenizer")
    assert byte_alphabet() == module.bytes_to_unicode()


# SentencePiece in GGUF


@pytest.fixture(scope="module")
def llama(shared_data: Path):
    return load_tokenizer(shared_data / "vocab" / "llama-spm.gguf")


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_llama_counts_of_the_biomedical_rows(llama, shared_data: Path) -> None:
    rows = texts_of(shared_data / "biomedqa" / "train.jsonl")
    assert sum(len(ids) for ids in llama.encode_batch(rows)) == 18_166
    assert [llama.decode(ids.tolist()) for ids in llama.encode_batch(rows)] == rows
    assert (llama.vocab_size, llama.bos_id, llama.eos_id, llama.add_bos) == (32_000, 1, 2, True)


def test_llama_known_ids(llama) -> None:
    assert llama.encode("Hello world", add_special=True) == [1, 15043, 3186]
    assert llama.encode("") == []
    assert llama.token_text(1) == "<s>"
    assert llama.special_ids == {0, 1, 2}


def sentencepiece_bpe(text: str, scores: dict[str, float], ids: dict[str, int]) -> list[int]:
    """SentencePiece's algorithm as described: merge the best neighbours until none is left."""
    symbols = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        pairs = [
            (-scores[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in scores
        ]
        if not pairs:
            break
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    out: list[int] = []
    for symbol in symbols:
        spelled = [symbol] if symbol in ids else [f"<0x{byte:02X}>" for byte in symbol.encode()]
        out += [ids[piece] for piece in spelled]
    return out


def test_llama_ids_equal_the_algorithm_on_scores(llama, shared_data: Path) -> None:
    fields = gguf.GGUFReader(shared_data / "vocab" / "llama-spm.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    values = fields["tokenizer.ggml.scores"].contents()
    scores = {t: s for t, s, kind in zip(tokens, values, kinds, strict=True) if kind == 1}
    ids = {token: i for i, token in enumerate(tokens)}
    emails = texts_of(shared_data / "email_style.jsonl")[:20]
    for text in [*TEXTS, *emails]:
        assert llama.encode(text) == sentencepiece_bpe(text, scores, ids)
        assert llama.decode(llama.encode(text)) == text


@pytest.mark.oracle
def test_llama_ids_equal_transformers(oracle, llama, shared_data: Path) -> None:
    (transformers,) = oracle("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(
        shared_data / "vocab", gguf_file="llama-spm.gguf"
    )
    rows = texts_of(shared_data / "biomedqa" / "train.jsonl")[:60] + TEXTS[2:]
    assert [llama.encode(t) for t in rows] == theirs(rows, add_special_tokens=False)["input_ids"]


# Byte-level BPE in GGUF


@pytest.mark.oracle
@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_gguf_bpe_equals_transformers(oracle, tmp_path: Path, pre: str) -> None:
    (transformers,) = oracle("transformers")
    source = train_bpe(tmp_path, PRE_TOKENIZERS[pre], name="source.json")
    write_gguf_bpe(tmp_path / "model.gguf", source, pre)
    ours = load_tokenizer(tmp_path / "model.gguf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    # llama.cpp composes nothing; Qwen's own tokenizer does, so its texts must be composed.
    texts = TEXTS if pre != "qwen2" else [t.replace("e\u0301", "é") for t in TEXTS]
    assert [ours.encode(t) for t in texts] == theirs(texts, add_special_tokens=False)["input_ids"]
    assert [ours.decode(ours.encode(t)) for t in texts] == texts


def test_gguf_bpe_keeps_specials_and_template(tmp_path: Path) -> None:
    source = train_bpe(tmp_path, PRE_TOKENIZERS["llama-bpe"], name="source.json")
    write_gguf_bpe(tmp_path / "model.gguf", source, "llama-bpe")
    tokenizer = load_tokenizer(tmp_path / "model.gguf")
    assert tokenizer.encode("<|eot|>")[0] == 2
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (0, 1, (1, 2))
    assert tokenizer.add_bos
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    assert tokenizer.vocab_size == len(json.loads(source.read_text())["model"]["vocab"])


@pytest.mark.parametrize(
    ("pre", "message"),
    [("falcon-3", "Did you mean 'falcon3'"), (None, "unknown tokenizer.ggml.pre")],
    ids=["misspelt", "absent"],
)
def test_unknown_splits_are_refused(tmp_path: Path, pre: str | None, message: str) -> None:
    write_gguf_bpe(tmp_path / "m.gguf", train_bpe(tmp_path, None), pre)
    with pytest.raises(FabricError, match=message):
        load_tokenizer(tmp_path / "m.gguf")


def test_llama3_vocabularies_are_known_without_the_key(tmp_path: Path) -> None:
    source = train_bpe(tmp_path, PRE_TOKENIZERS["llama-bpe"], name="source.json")
    source.write_text(source.read_text().replace("<|bos|>", "<|begin_of_text|>"))
    write_gguf_bpe(tmp_path / "old.gguf", source, None)
    write_gguf_bpe(tmp_path / "new.gguf", source, "llama-bpe")
    old, new = (load_tokenizer(tmp_path / name) for name in ("old.gguf", "new.gguf"))
    assert old.fingerprint == new.fingerprint


def test_gguf_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "bitnet")
    writer.add_tokenizer_model("no_vocab")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(FabricError, match="holds no vocabulary"):
        load_tokenizer(tmp_path / "m.gguf")


def test_a_cut_off_gguf_is_refused(tmp_path: Path, shared_data: Path) -> None:
    whole = (shared_data / "vocab" / "llama-spm.gguf").read_bytes()
    for size in (0, 3, 100, 5_000):
        (tmp_path / "m.gguf").write_bytes(whole[:size])
        with pytest.raises(FabricError, match=r"cannot read .*m\.gguf"):
            load_tokenizer(tmp_path / "m.gguf")


# Folders


def write_folder(folder: Path, **config: object) -> Path:
    train_bpe(folder, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_folder_settings(tmp_path: Path) -> None:
    write_folder(
        tmp_path,
        bos_token={"content": "<|bos|>", "lstrip": False},
        eos_token="<|eos|>",
        chat_template="from config",
    )
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, None)
    assert tokenizer.stop_ids == (1, 2)
    assert tokenizer.add_bos  # the post-processor adds it
    assert tokenizer.chat_template == "from config"
    (tmp_path / "chat_template.jinja").write_text("from file")
    assert load_tokenizer(tmp_path / "tokenizer.json").chat_template == "from file"
    (tmp_path / "mine.jinja").write_text("mine")
    changed = load_tokenizer(tmp_path, chat_template=tmp_path / "mine.jinja")
    assert changed.chat_template == "mine"
    assert changed.fingerprint == tokenizer.fingerprint
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(FabricError, match=r"cannot read chat template .*chat_template\.jinja"):
        load_tokenizer(tmp_path)


def test_configured_bos_beats_the_post_processor(tmp_path: Path) -> None:
    write_folder(tmp_path, bos_token="<|bos|>", eos_token="<|eos|>", add_bos_token=False)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("hi", add_special=True) == tokenizer.encode("hi")


def test_truncation_stored_in_a_file_is_off(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(train_bpe(tmp_path, None)))
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).encode("one two three four five six")) > 9


def test_fingerprint_changes_with_the_vocabulary(tmp_path: Path) -> None:
    write_folder(tmp_path, eos_token="<|eos|>")
    first = load_tokenizer(tmp_path)
    assert first.fingerprint == load_tokenizer(tmp_path).fingerprint
    first.backend.add_tokens([AddedToken("new")])
    first.backend.save(str(tmp_path / "tokenizer.json"))
    second = load_tokenizer(tmp_path)
    assert second.fingerprint != load_tokenizer("").fingerprint
    assert second.vocab_size == first.vocab_size + 1
    assert second.fingerprint != byte_tokenizer().fingerprint


@pytest.mark.oracle
def test_folder_equals_transformers(oracle, tmp_path: Path) -> None:
    (transformers,) = oracle("transformers")
    write_folder(tmp_path, bos_token="<|bos|>", eos_token="<|eos|>")
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert ours.encode(text, add_special=True) == fast(text)["input_ids"]


@pytest.mark.oracle
def test_sentencepiece_model_equals_the_gguf_of_the_same_pieces(
    oracle, tmp_path: Path, llama, shared_data: Path
) -> None:
    (schema,) = oracle("transformers.utils.sentencepiece_model_pb2_new")
    fields = gguf.GGUFReader(shared_data / "vocab" / "llama-spm.gguf").fields
    model = schema.ModelProto()
    for token, score, kind in zip(
        fields["tokenizer.ggml.tokens"].contents(),
        fields["tokenizer.ggml.scores"].contents(),
        fields["tokenizer.ggml.token_type"].contents(),
        strict=True,
    ):
        model.pieces.add(piece=token, score=score, type=kind)
    model.trainer_spec.model_type = 2
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 32000, "</line>": 32001}')
    ours = load_tokenizer(tmp_path)
    assert (ours.vocab_size, ours.pad_id, ours.bos_id, ours.add_bos) == (32_002, 32_000, 1, True)
    for text in TEXTS:
        assert ours.encode(text) == llama.encode(text)
    assert ours.encode("</line>") == [32_001]
    model.trainer_spec.model_type = 1
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(FabricError, match="not a BPE model"):
        load_tokenizer(tmp_path)


def test_offsets_cover_the_text(llama) -> None:
    for text in TEXTS:
        offsets = llama.encode_with_offsets(text).offsets
        covered = np.zeros(len(text), bool)
        for start, end in offsets.tolist():
            covered[start:end] = True
        assert covered.all()


# What is refused


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.gguf", "no tokenizer at missing.gguf"),
        ("./nowhere/here", "no tokenizer at ./nowhere/here"),
        ("nobody/nothing@main", "cannot get tokenizer nobody/nothing@main from the hub"),
    ],
)
def test_missing_sources(source: str, message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FabricError, match=re.escape(message)):
        load_tokenizer(source)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(FabricError, match=r"expected tokenizer\.json or tokenizer\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FabricError, match=r"expected a tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\xff\xff")
    with pytest.raises(FabricError, match="expected a SentencePiece model"):
        load_tokenizer(tmp_path)
    train_bpe(tmp_path, None)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(FabricError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(FabricError, match="cannot read chat template"):
        load_tokenizer("", chat_template=tmp_path / "none.jinja")
