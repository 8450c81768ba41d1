"""A tokenizer follows its model through every format."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fabric_jax.checkpoints.gguf.write import write_gguf
from fabric_jax.checkpoints.huggingface.write import write_huggingface
from fabric_jax.checkpoints.loading import open_source
from fabric_jax.checkpoints.native_write import write_native
from fabric_jax.checkpoints.tokenizer_copy import copy_tokenizer, special_tokens
from fabric_jax.data.gguf_vocabulary import PRE_TOKENIZERS
from fabric_jax.data.tokenizer import Tokenizer, load_tokenizer
from fabric_jax.errors import FabricError
from tests.checkpoints.tree_source import TreeSource, source_of
from tests.data.test_tokenizer import TEXTS, train_bpe
from tests.models.tiny_problems import Size, make_problem

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level vocabulary with settings and a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(folder, PRE_TOKENIZERS["llama-bpe"])
    settings: dict[str, Any] = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    settings |= {"add_bos_token": True, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    return folder


@pytest.fixture(scope="module")
def source(folder: Path) -> TreeSource:
    size = Size(
        vocab=load_tokenizer(folder).vocab_size,
        layers=1,
        hidden=16,
        ffn=24,
        heads=2,
        kv_heads=2,
        length=9,
    )
    return source_of(make_problem("bitnet-silu-offline", size), tokenizer_source=str(folder))


def assert_same(found: Tokenizer, expected: Tokenizer) -> None:
    for text in [*TEXTS, "<|bos|>hi<|eot|>"]:
        assert found.encode(text, add_special=True) == expected.encode(text, add_special=True)
    for name in ("bos_id", "eos_id", "stop_ids", "add_bos", "chat_template"):
        assert getattr(found, name) == getattr(expected, name), name


def test_through_native_gguf_and_transformers(
    source: TreeSource, folder: Path, tmp_path: Path
) -> None:
    expected = load_tokenizer(folder)
    write_native(source, tmp_path / "n")
    native = open_source(tmp_path / "n")
    assert_same(load_tokenizer(native.tokenizer_source), expected)
    write_gguf(tmp_path / "m.gguf", native, kind="F16")
    write_huggingface(open_source(tmp_path / "m.gguf"), tmp_path / "h", packed=False)
    back = open_source(tmp_path / "h", mode="float")
    assert_same(load_tokenizer(back.tokenizer_source), expected)
    config = json.loads((tmp_path / "h" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, [1, 2])
    # A folder with all these files is replaced like any other.
    write_native(source, tmp_path / "n")


@pytest.mark.oracle
def test_transformers_has_the_same_ids_and_template(
    source: TreeSource, folder: Path, tmp_path: Path, oracle: Any
) -> None:
    (transformers,) = oracle("transformers")
    ours = load_tokenizer(folder)
    write_gguf(tmp_path / "m.gguf", source, kind="F16")
    (tmp_path / "h").mkdir()
    copy_tokenizer(str(tmp_path / "m.gguf"), tmp_path / "h")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "h")
    for text in TEXTS:
        assert theirs(text).input_ids == ours.encode(text, add_special=True)
    messages = [{"role": "user", "content": "hello"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == "hello"


def test_a_model_without_one_gets_no_files(source: TreeSource, tmp_path: Path) -> None:
    assert copy_tokenizer("", tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    assert set(special_tokens(None).values()) == {None}
    write_native(replace(source, tokenizer_source=""), tmp_path / "n")
    assert open_source(tmp_path / "n").tokenizer_source == ""


def test_a_missing_tokenizer_leaves_nothing(source: TreeSource, tmp_path: Path) -> None:
    broken = replace(source, tokenizer_source=str(tmp_path / "none" / "tokenizer.json"))
    with pytest.raises(FabricError, match="no tokenizer at"):
        write_huggingface(broken, tmp_path / "m", packed=True)
    with pytest.raises(FabricError, match="no tokenizer at"):
        write_native(broken, tmp_path / "n")
    assert list(tmp_path.iterdir()) == []
