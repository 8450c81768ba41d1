"""The vocabulary learnt from the corpus."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric_jax.data import Tokenizer, load_tokenizer
from fabric_jax.quickstart.corpus import OUTCOMES, make_corpus
from fabric_jax.quickstart.vocabulary import LARGEST, train_vocabulary


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    path.write_bytes(train_vocabulary(make_corpus(0).statements))
    return load_tokenizer(path)


def test_equal_texts_give_equal_vocabularies():
    statements = make_corpus(3, drugs=30, held_out=2).statements
    assert train_vocabulary(statements) == train_vocabulary(statements)


def test_special_tokens_are_found_without_further_files(tokenizer: Tokenizer):
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.add_bos
    assert tokenizer.stop_ids == (2,)
    assert tokenizer.vocab_size <= LARGEST


def test_answers_are_one_token_each_and_differ(tokenizer: Tokenizer):
    ids = [tokenizer.encode(f" {outcome}") for outcome in OUTCOMES]
    assert [len(i) for i in ids] == [1, 1, 1]
    assert len({i[0] for i in ids}) == 3


def test_statements_are_short(tokenizer: Tokenizer):
    statements = make_corpus(0).statements
    tokens = sum(len(ids) for ids in tokenizer.encode_batch(statements))
    assert tokens < 0.25 * sum(len(text.encode()) for text in statements)


@given(st.text())
def test_any_text_comes_back(tokenizer: Tokenizer, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text
