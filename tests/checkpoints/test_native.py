import errno
import json
import resource
import struct
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fabric_jax.checkpoints.native import (
    is_model_folder,
    load_model_folder,
    read_model_config,
    save_model,
)
from fabric_jax.errors import FabricError
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.initialize import initialize_base
from fabric_jax.models.registry import get_config

CONFIG = replace(
    get_config("bitnet-tiny"),
    name="small",
    num_layers=2,
    hidden_size=24,
    ffn_size=37,
    num_heads=2,
    num_kv_heads=1,
    head_dim=12,
    vocab_size=50,
)


UNREADABLE = r"cannot read .*model\.safetensors"


@cache
def make(mode="packed", dtype="float32", config=CONFIG, **options):
    definition = define_decoder(config, DecoderOptions(mode=mode, dtype=dtype, **options))
    return definition, initialize_base(definition, 1)


def assert_same_bits(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture
def saved(tmp_path):
    definition, base = make()
    folder = tmp_path / "model"
    save_model(folder, definition, base, tokenizer_json=b'{"vocab": 1}')
    return folder


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["packed", "master", "float"])
def test_model_returns_bit_for_bit(tmp_path, mode, dtype, tied):
    definition, base = make(
        mode, dtype, replace(CONFIG, tied_head=tied, sub_norms=tied), act_quant="block256"
    )
    save_model(tmp_path / "model", definition, base, tokenizer_json=None)
    again, loaded = load_model_folder(tmp_path / "model")
    assert_same_bits(loaded, base)
    assert again.config == definition.config
    assert again.options == replace(definition.options, lora=LoraConfig(rank=0))


def test_files(saved):
    assert sorted(path.name for path in saved.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    # The library's own reader sees the tree under dotted names.
    tensors = load_file(saved / "model.safetensors")
    _, base = make()
    packed = tensors["layers.mlp.down.weight"]
    np.testing.assert_array_equal(packed, base["layers"]["mlp"]["down"]["weight"])
    assert packed.dtype == np.uint8
    assert (saved / "tokenizer.json").read_bytes() == b'{"vocab": 1}'
    stored = read_model_config(saved)
    assert stored.tokenizer == saved / "tokenizer.json"
    assert stored.model == CONFIG
    assert is_model_folder(saved)


def test_options_of_the_loader(saved):
    options = DecoderOptions(
        dtype="bfloat16", act_quant="none", remat="layer", lora=LoraConfig(rank=2)
    )
    definition, base = load_model_folder(saved, options)
    assert definition.options == options
    assert base["embedding"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(base["embedding"], make()[1]["embedding"].astype(jnp.bfloat16))
    assert base["layers"]["mlp"]["up"]["scale"].dtype == jnp.float32
    assert jax.tree.leaves(definition.adapter)


def test_another_mode_is_refused(saved):
    with pytest.raises(FabricError, match="holds packed weights"):
        load_model_folder(saved, DecoderOptions(mode="master"))


def test_the_loaded_model_does_not_need_its_file(saved):
    _, loaded = load_model_folder(saved)
    weights = saved / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(200)
        file.write(bytes(weights.stat().st_size - 200))
    assert_same_bits(loaded, make()[1])


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers.mlp.up.scale"), "layers.mlp.up.scale is missing"),
        (lambda t: t.update(extra=np.ones(2, np.float32)), "extra is unexpected"),
        (
            lambda t: t.update(embedding=np.ones((50, 25), np.float32)),
            r"embedding is float32\[50,25\] instead of float32\[50,24\]",
        ),
        (
            lambda t: t.update(embedding=np.ones((50, 24), np.float16)),
            r"embedding is float16\[50,24\] instead of float32\[50,24\]",
        ),
        (
            lambda t: t.update(embedding=np.full((50, 24), np.nan, np.float32)),
            "embedding in .* not finite",
        ),
        (
            lambda t: t["layers.attention.q.weight"].__setitem__((1, 3, 2), 0b00110001),
            r"layers.attention.q.weight in .* no packed ternary codes",
        ),
        (lambda t: t.update(extra=np.ones(2, np.float64)), "extra in .* unknown dtype"),
    ],
    ids=["missing", "unexpected", "shape", "dtype", "not-finite", "code-3", "unknown-dtype"],
)
def test_other_tensors_are_refused(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(FabricError, match=message):
        load_model_folder(saved)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1]),
            UNREADABLE,
        ),
        (lambda path: path.write_bytes(b""), UNREADABLE),
        (
            lambda path: path.write_bytes(struct.pack("<Q", 1 << 40)),
            r"the header of .*model\.safetensors is too large",
        ),
        (Path.unlink, r"model\.safetensors does not exist"),
    ],
    ids=["cut", "empty", "header", "deleted"],
)
def test_damaged_weights(saved, damage, message):
    damage(saved / "model.safetensors")
    with pytest.raises(FabricError, match=message):
        load_model_folder(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=2), "another version"),
        (lambda c: c.update(format="other"), "not of a fabric_jax model"),
        (lambda c: c.pop("mode"), "lacks mode"),
        (lambda c: c.update(mode="packd"), "Did you mean 'packed'"),
        (lambda c: c.update(act_quant="per-token"), "Did you mean 'per_token'"),
        (lambda c: c.update(tokenizer="../secret.json"), "tokenizer"),
        (lambda c: c.update(dtyp="float32"), "Did you mean 'dtype'"),
        (lambda c: c["model"].update(hidden_sise=1), "Did you mean 'hidden_size'"),
        (lambda c: c["model"].pop("hidden_size"), "lacks hidden_size"),
        (lambda c: c.update(model=[]), "lacks a model"),
        (lambda c: c["model"].update(num_layers=3), r"layers.*\[2,.*instead of.*\[3,"),
    ],
)
def test_other_configurations_are_refused(saved, change, message):
    path = saved / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(FabricError, match=message):
        load_model_folder(saved)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"model": 1'])
def test_configurations_that_are_no_json_object(saved, content):
    (saved / "config.json").write_text(content)
    with pytest.raises(FabricError, match=r"config\.json"):
        load_model_folder(saved)


def test_weights_of_another_model_are_not_saved(tmp_path):
    definition, _ = make()
    _, base = make("master")
    with pytest.raises(FabricError, match="not those of small"):
        save_model(tmp_path / "model", definition, base, tokenizer_json=None)
    assert not (tmp_path / "model").exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    definition, base = make()
    base = base | {"embedding": base["embedding"].at[3, 3].set(jnp.inf)}
    with pytest.raises(FabricError, match="embedding has values that are not finite"):
        save_model(tmp_path / "model", definition, base, tokenizer_json=None)
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_model_is_replaced_whole(saved):
    definition, base = make("master")
    save_model(saved, definition, base, tokenizer_json=None)
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in saved.parent.iterdir()] == ["model"]
    assert_same_bits(load_model_folder(saved)[1], base)


def test_other_files_are_never_removed(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    definition, base = make()
    with pytest.raises(FabricError, match=r"holds other files.*thesis\.tex"):
        save_model(tmp_path, definition, base, tokenizer_json=None)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_full_disk_leaves_the_earlier_model(saved):
    before = (saved / "model.safetensors").read_bytes()
    definition, base = make("master")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(FabricError, match=f"cannot write {saved}"):
            save_model(saved, definition, base, tokenizer_json=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (saved / "model.safetensors").read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(FabricError, match="is a file"):
        save_model(tmp_path / "model", *make(), tokenizer_json=None)


def test_a_link_to_a_folder_stays_one(saved):
    link = saved.parent / "latest"
    link.symlink_to(saved)
    definition, base = make("master")
    save_model(link, definition, base, tokenizer_json=None)
    assert sorted(path.name for path in saved.parent.iterdir()) == ["latest", "model"]
    assert link.is_symlink()
    assert_same_bits(load_model_folder(saved)[1], base)


def test_a_folder_that_cannot_be_replaced(saved, monkeypatch):
    definition, base = make("master")
    rename = Path.rename
    monkeypatch.setattr(Path, "is_mount", lambda path: path == saved)
    with pytest.raises(FabricError, match=r"a disk is mounted.* Choose a folder in it"):
        save_model(saved, definition, base, tokenizer_json=None)

    def refuse(source, target):
        if source == saved:
            raise OSError(errno.EBUSY, "busy")
        return rename(source, target)

    monkeypatch.setattr(Path, "is_mount", lambda path: False)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(FabricError, match=r"cannot write .*model: busy"):
        save_model(saved, definition, base, tokenizer_json=None)
    assert [path.name for path in saved.parent.iterdir()] == ["model"]
    assert_same_bits(load_model_folder(saved)[1], make()[1])
