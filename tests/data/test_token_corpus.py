"""Corpora on disk and the streams that are cut from them."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tokenizers import normalizers

from fabric_jax.data import corpus as corpus_module
from fabric_jax.data import load_corpus
from fabric_jax.data.bpe import train_bpe
from fabric_jax.data.config import DataConfig
from fabric_jax.data.corpus import (
    Corpus,
    CorpusSettings,
    check_corpus,
    open_corpus,
    write_corpus,
)
from fabric_jax.data.load_corpus import corpus_tokenizer, prepare_corpus, stream_data
from fabric_jax.data.rows import Row, parse_row
from fabric_jax.data.stdlib import stdlib_documents, stdlib_files
from fabric_jax.data.token_stream import TokenStream
from fabric_jax.data.tokenizer import byte_tokenizer
from fabric_jax.errors import FabricError

TEXTS = [f"document {i} " + "abc " * (i % 7) for i in range(40)]
SETTINGS = CorpusSettings(source="texts", held_out=0.2, seed=1)


def rows() -> Iterator[Row]:
    return (parse_row({"text": text}, f"row {i}") for i, text in enumerate(TEXTS))


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    """In shards of 100 tokens."""
    monkeypatch.setattr(corpus_module, "SHARD_TOKENS", 100)
    return write_corpus(tmp_path / "corpus", SETTINGS, rows(), byte_tokenizer())


def stream(corpus: Corpus, **changes: Any) -> TokenStream:
    settings: dict[str, Any] = {"length": 16, "rows": 3, "accumulation": None, "seed": 5}
    return TokenStream(corpus.train, corpus=corpus.digest, **(settings | changes))


def test_shards_hold_every_document_once_with_its_boundaries(corpus: Corpus) -> None:
    tokenizer = byte_tokenizer()
    assert len(list(corpus.folder.glob("train-0*.bin"))) > 3
    found: list[str] = []
    assert corpus.held_out is not None
    for split in (corpus.train, corpus.held_out):
        ends = [*split.starts[1:], split.tokens]
        for start, end in zip(split.starts, ends, strict=True):
            ids = split.read(int(start), int(end))
            assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
            found.append(tokenizer.decode(ids[1:-1].tolist()))
    assert sorted(found) == sorted(TEXTS)
    size = corpus.train.text_bytes + corpus.held_out.text_bytes
    assert size == sum(len(text.encode()) for text in TEXTS)
    assert 0 < len(corpus.held_out.starts) < 20


@pytest.mark.parametrize("document_mask", [True, False])
def test_every_token_is_a_target_once_an_epoch(corpus: Corpus, document_mask: bool) -> None:
    whole = corpus.train.read(0, corpus.train.tokens)
    seen = np.zeros(len(whole), int)
    for row in range(stream(corpus).row_count):
        fields = stream(corpus, document_mask=document_mask)._row(row)
        tokens, targets, mask, segments, positions = fields
        start = row * 16
        for i in np.flatnonzero(segments):
            assert tokens[i] == whole[start + i]
            if mask[i]:
                assert targets[i] == whole[start + i + 1]
                seen[start + i + 1] += 1
            begin = i - positions[i]
            assert segments[begin] == segments[i]
            assert begin == 0 or segments[begin - 1] != segments[begin]
    expected = np.ones(len(whole), int)
    expected[corpus.train.starts if document_mask else [0]] = 0
    np.testing.assert_array_equal(seen, expected)


def test_segments_begin_where_documents_do(corpus: Corpus) -> None:
    starts = set(corpus.train.starts.tolist())
    one = stream(corpus)
    for row in range(one.row_count):
        segments = one._row(row)[3]
        begins = 1 + np.flatnonzero(np.diff(segments[segments > 0]))
        inside = {start - row * 16 for start in starts if row * 16 < start < row * 16 + 16}
        inside = {place for place in inside if segments[place]}
        assert set(begins.tolist()) == inside


def test_a_position_is_taken_up_exactly(corpus: Corpus) -> None:
    one, other = stream(corpus, accumulation=2), stream(corpus, accumulation=2)
    for _ in range(one.batches_in_epoch(0) + 3):
        next(one)
    state = json.loads(json.dumps(one.get_state()))
    assert state["epoch"] == 1
    other.set_state(state)
    for _ in range(5):
        left, right = next(one), next(other)
        assert left.tokens.shape == (2, 3, 16)
        np.testing.assert_array_equal(left.tokens, right.tokens)
    with pytest.raises(FabricError, match="changed since the checkpoint"):
        stream(corpus, length=8).set_state(state)


def test_epochs_have_orders_of_their_own_with_the_same_rows(corpus: Corpus) -> None:
    one = stream(corpus)
    epochs = [
        np.concatenate([np.asarray(b.tokens) for b in one.epoch(number)]) for number in (0, 1)
    ]
    assert not np.array_equal(epochs[0], epochs[1])
    assert sorted(map(bytes, epochs[0])) == sorted(map(bytes, epochs[1]))


def test_damage_and_other_settings_are_refused(corpus: Corpus) -> None:
    fingerprint = byte_tokenizer().fingerprint
    check_corpus(corpus.folder, SETTINGS, fingerprint)
    with pytest.raises(FabricError, match=r"another held out; expected 0\.5"):
        check_corpus(
            corpus.folder, CorpusSettings(source="texts", held_out=0.5, seed=1), fingerprint
        )
    with pytest.raises(FabricError, match="another tokenizer"):
        check_corpus(corpus.folder, SETTINGS, "other")
    shard = corpus.folder / "train-00001.bin"
    data = bytearray(shard.read_bytes())
    data[7] ^= 1
    shard.write_bytes(data)
    with pytest.raises(FabricError, match=r"train-00001\.bin is damaged"):
        open_corpus(corpus.folder)


def test_conversations_are_no_documents(tmp_path: Path) -> None:
    chat = parse_row({"messages": [{"role": "user", "content": "hi"}]}, "row 1")
    with pytest.raises(FabricError, match="row 1: a conversation is no document"):
        write_corpus(tmp_path / "c", SETTINGS, [chat], byte_tokenizer())
    assert not list(tmp_path.iterdir())


def test_standard_library_by_files(tmp_path: Path) -> None:
    for name, text in (("b.py", "x = 1\n"), ("a/c.py", "y = 2\n"), ("test/t.py", "no\n")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    found = [(name, text) for name, text in stdlib_documents(tmp_path) if "topic/" not in name]
    assert found == [("a/c.py", "y = 2\n"), ("b.py", "x = 1\n")]
    names = [path.name for path in stdlib_files()]
    assert "argparse.py" in names
    assert "test_argparse.py" not in names


def test_a_vocabulary_is_learnt_once_and_the_corpus_made_once(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    config = DataConfig(data=str(data), eval_fraction=0.2, max_length=16, batch_size=2)
    folder = tmp_path / "corpus"
    tokenizer = corpus_tokenizer(folder, config, size=280, own="")
    made = prepare_corpus(folder, config, tokenizer, learnt=280)
    again = corpus_tokenizer(folder, config, size=280, own="")
    assert again.fingerprint == tokenizer.fingerprint
    data.unlink()
    assert prepare_corpus(folder, config, again, learnt=280).digest == made.digest
    # Named, it is the same vocabulary, whatever it was learnt for.
    assert prepare_corpus(folder, config, again).digest == made.digest
    assert not list(tmp_path.glob("*tokenizer*"))
    streamed = stream_data(made, config, tokenizer)
    assert streamed.evaluation_bytes == made.held_out.text_bytes  # pyright: ignore
    assert streamed.summary.tokens == made.train.tokens
    assert json.loads(train_bpe(TEXTS, largest=280))["model"]["vocab"]["<bos>"] == 1


@pytest.mark.parametrize("accumulation", [None, 2])
def test_shares_of_processes_are_the_rows_of_the_whole(
    corpus: Corpus, accumulation: int | None
) -> None:
    settings: dict[str, Any] = {"rows": 4, "accumulation": accumulation}
    whole, parts = stream(corpus, **settings), []
    for first in (0, 2):
        part = stream(corpus, **settings)
        part.take_share(first, first + 2)
        parts.append(part)
    for _ in range(whole.batches_in_epoch(0) + 1):
        expected = next(whole)
        found = jax.tree.map(lambda *a: np.concatenate(a, axis=-2), *map(next, parts))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert parts[0].get_state() == whole.get_state()


def write_rows(path: Path) -> str:
    rows = [{"text": text, "title": f"title {i}"} for i, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_corpus_of_another_column_or_size_of_vocabulary_is_refused(tmp_path: Path) -> None:
    config = DataConfig(data=write_rows(tmp_path / "rows.jsonl"))
    folder, tokenizer = tmp_path / "corpus", byte_tokenizer()
    learnt = corpus_tokenizer(folder, config, size=280, own="")
    prepare_corpus(folder, config, learnt, learnt=280)
    smaller = corpus_tokenizer(folder, config, size=270, own="")
    with pytest.raises(FabricError, match="another vocabulary; expected 270; found 280"):
        prepare_corpus(folder, config, smaller, learnt=270)
    other = DataConfig(data=config.data, columns=("text=title",))
    folder = tmp_path / "titles"
    titles = prepare_corpus(folder, other, tokenizer)
    with pytest.raises(FabricError, match=r"another column; expected \[\]; found \['text=title'\]"):
        prepare_corpus(folder, config, tokenizer)
    index = json.loads((folder / "index.json").read_text())
    del index["settings"]["columns"], index["settings"]["vocabulary"]  # as earlier versions wrote
    (folder / "index.json").write_text(json.dumps(index))
    assert prepare_corpus(folder, config, tokenizer).train.tokens == titles.train.tokens


def test_a_vocabulary_is_never_that_of_an_attempt_that_failed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    config, folder = DataConfig(data=str(path)), tmp_path / "corpus"
    with pytest.raises(FabricError, match="a conversation is no document"):
        prepare_corpus(folder, config, corpus_tokenizer(folder, config, size=280, own=""))
    write_rows(path)
    assert corpus_tokenizer(folder, config, size=280, own="").vocab_size == 280


def test_all_who_want_a_corpus_at_once_get_the_one_that_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(data=write_rows(tmp_path / "rows.jsonl"))
    made: list[Path] = []
    write = load_corpus.write_corpus

    def counted(folder: Path, *given: Any, **named: Any) -> Corpus:
        made.append(folder)
        return write(folder, *given, **named)

    monkeypatch.setattr(load_corpus, "write_corpus", counted)
    with ThreadPoolExecutor(4) as pool:
        futures = [
            pool.submit(prepare_corpus, tmp_path / "corpus", config, byte_tokenizer())
            for _ in range(4)
        ]
    assert len({future.result().digest for future in futures}) == 1
    assert made == [tmp_path / "corpus"]


def test_documents_without_tokens_are_left_out(tmp_path: Path) -> None:
    tokenizer = replace(byte_tokenizer(), bos_id=None, eos_id=None, add_bos=False)
    tokenizer.backend.normalizer = normalizers.Strip()
    documents = [parse_row({"text": text}, "row") for text in ("ab", " ", "cd", "\n", "e")]
    corpus = write_corpus(tmp_path / "c", CorpusSettings(source="s"), documents, tokenizer)
    assert corpus.train.starts.tolist() == [0, 2, 4]
    positions = stream(corpus, length=4, rows=1)._row(0)[4]
    assert positions.tolist() == [0, 1, 0, 1]


def test_a_corpus_that_is_all_held_out_says_so(tmp_path: Path) -> None:
    settings = CorpusSettings(source="texts", held_out=0.999999)
    with pytest.raises(FabricError, match="found 40 documents, all of them held out"):
        write_corpus(tmp_path / "corpus", settings, rows(), byte_tokenizer())


@pytest.mark.parametrize("document_mask", [True, False])
def test_the_summary_counts_the_targets_of_an_epoch(corpus: Corpus, document_mask: bool) -> None:
    config = DataConfig(data="texts", max_length=16, batch_size=3)
    data = stream_data(corpus, config, byte_tokenizer(), document_mask=document_mask)
    targets = sum(int(batch.loss_mask.sum()) for batch in data.train.epoch(0))
    assert data.summary.trainable_tokens == targets
