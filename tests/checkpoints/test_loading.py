from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fabric_jax.checkpoints.loading import load_base, open_source
from fabric_jax.checkpoints.native import save_model
from fabric_jax.checkpoints.peft import save_adapter
from fabric_jax.errors import FabricError
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.initialize import initialize_adapter, initialize_base
from fabric_jax.models.packing import pack_base
from fabric_jax.models.registry import get_config

CONFIG = replace(
    get_config("bitnet-tiny"),
    name="small",
    num_layers=2,
    hidden_size=24,
    ffn_size=40,
    num_heads=2,
    num_kv_heads=2,
    head_dim=12,
    vocab_size=50,
)


def assert_equal(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@cache
def make_base(mode):
    return initialize_base(define_decoder(CONFIG, DecoderOptions(mode=mode)), 4)


@pytest.fixture
def folder(tmp_path):
    def save(mode, tokenizer=None, **options):
        definition = define_decoder(CONFIG, DecoderOptions(mode=mode, **options))
        base = make_base(mode)
        save_model(tmp_path / mode, definition, base, tokenizer_json=tokenizer)
        return tmp_path / mode, definition, base

    return save


def test_registry_name_gives_random_packed_weights():
    loaded = load_base("bitnet-tiny", seed=3, lora=LoraConfig(rank=2), remat="layer")
    assert loaded.definition.config == get_config("bitnet-tiny")
    assert loaded.definition.options.mode == "packed"
    assert loaded.definition.options.remat == "layer"
    assert loaded.tokenizer_source == ""
    assert_equal(loaded.base, initialize_base(loaded.definition, 3))
    assert jax.tree.leaves(loaded.definition.adapter)
    other = load_base("bitnet-tiny", seed=4).base["embedding"]
    assert not np.array_equal(loaded.base["embedding"], other)


@pytest.mark.parametrize("mode", ["packed", "master", "float"])
def test_registry_name_in_any_mode(mode):
    loaded = load_base("bitnet-tiny", mode=mode, dtype="bfloat16")
    assert loaded.definition.options.mode == mode
    assert loaded.base["embedding"].dtype == jnp.bfloat16


@pytest.mark.parametrize("mode", ["packed", "float"])
def test_folder(folder, mode):
    path, definition, base = folder(mode, act_quant="block256")
    for source in (path, str(path)):
        loaded = load_base(source)
        assert loaded.definition.options == definition.options
        assert loaded.tokenizer_source == ""
        assert_equal(loaded.base, base)
    assert load_base(path, act_quant="none").definition.options.act_quant == "none"


def test_folder_in_the_home(folder, monkeypatch):
    path, _, base = folder("packed")
    monkeypatch.setenv("HOME", str(path.parent))
    assert_equal(load_base("~/packed").base, base)


def test_tokenizer_of_the_folder(folder):
    path, _, _ = folder("packed", tokenizer=b"{}")
    assert load_base(path).tokenizer_source == str(path / "tokenizer.json")


def test_master_weights_are_packed(folder):
    path, definition, base = folder("master")
    packed = load_base(path, lora=LoraConfig(rank=2))
    assert packed.definition.options.mode == "packed"
    assert packed.definition.options.lora.rank == 2
    assert_equal(packed.base, pack_base(definition, base)[1])
    assert_equal(load_base(path, mode="master").base, base)


def test_packed_weights_have_no_masters(folder):
    with pytest.raises(FabricError, match=r"holds packed weights.*into master ones"):
        load_base(folder("packed")[0], mode="master")


def foreign(path):
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "mamba"}')
    save_file({"x": np.ones(2, np.float32)}, path / "model.safetensors")


def vocabulary(path):
    path.mkdir()
    (path / "model.gguf").write_bytes(b"GGUF")


def adapter(path):
    definition = define_decoder(CONFIG, DecoderOptions(lora=LoraConfig(rank=2)))
    save_adapter(path, definition, initialize_adapter(definition, 0), "small")


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("none.gguf", lambda path: None, "does not exist"),
        ("gguf", vocabulary, r"no config\.json.*Name \S+model\.gguf itself"),
        ("adapter", adapter, "is an adapter, not a model.*Give its base model"),
        ("empty", lambda path: path.mkdir(), r"no config\.json"),
        ("file", lambda path: path.write_bytes(b""), "it is a file"),
        ("nothing", lambda path: None, "does not exist"),
    ],
)
def test_what_is_no_model(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(FabricError, match=message) as caught:
        load_base(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "a registry name" in str(caught.value)
    assert "a folder saved by fabric_jax or by transformers" in str(caught.value)


def test_another_architecture(tmp_path):
    foreign(tmp_path / "model")
    with pytest.raises(FabricError, match=r"unknown model_type in config\.json 'mamba'.*bitnet"):
        load_base(tmp_path / "model")


def test_a_gguf_file_that_is_none(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(FabricError, match=r"model\.gguf"):
        load_base(tmp_path / "model.gguf")


def test_plain_weights_as_masters(folder):
    path, _, base = folder("float")
    loaded = load_base(path, mode="master")
    assert loaded.definition.options.mode == "master"
    assert_equal(loaded.base, base)


def test_a_scale_that_is_none(folder):
    path, _, _ = folder("packed")
    tensors = load_file(path / "model.safetensors")
    tensors["layers.mlp.up.scale"] = np.array([1, -1], np.float32)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(FabricError, match=r"layers\.mlp\.up\.scale in .* is no scale"):
        load_base(path)


@pytest.mark.parametrize(
    ("name", "close"), [("bitnet-125", "bitnet-125m"), ("Bitnet-13B", "bitnet-13b")]
)
def test_misspelt_names(name, close, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FabricError, match=f"unknown model '{name}'.*Did you mean '{close}'"):
        load_base(name)


def test_a_registry_name_where_stored_weights_are_wanted(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FabricError, match="stands for a size, not for stored weights"):
        open_source("qwen3-0.6b")


def test_rank_larger_than_a_dimension(folder):
    with pytest.raises(FabricError, match="rank 25"):
        load_base(folder("packed")[0], lora=LoraConfig(rank=25))
