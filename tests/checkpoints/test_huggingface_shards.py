"""Folders whose files don't fit together, each named in the message."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fabric_jax.checkpoints.huggingface.read import open_huggingface
from fabric_jax.checkpoints.huggingface.shards import open_shards
from fabric_jax.errors import FabricError
from tests.checkpoints import hf_folder

Q = "model.layers.0.self_attn.q_proj.weight"
SCALE = "model.layers.0.self_attn.q_proj.weight_scale"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path):
    hf_folder.write_problem(tmp_path / "model", "llama-bitlinear")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path):
    hf_folder.write_problem(tmp_path / "model", "llama-bitlinear", shards=3)
    return tmp_path / "model"


def rewrite(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def set_value(name, value):
    def change(tensors):
        tensors[name].reshape(-1)[0] = value

    return change


def read_all(folder):
    source = open_huggingface(folder)
    source.tensor("embedding")
    return source.linear("attention.q", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q), f"{Q} is missing"),
        (lambda t: t.pop(SCALE), f"{SCALE} is missing"),
        (lambda t: t.pop(EMBEDDING), f"{EMBEDDING} is missing"),
        (lambda t: t.pop("lm_head.weight"), r"lm_head\.weight is missing"),
        (lambda t: t.update(extra=np.ones(2, np.float32)), "extra is unexpected"),
        (
            lambda t: t.update({f"{Q[:-7]}.bias": np.ones(16, np.float32)}),
            "q_proj.bias is unexpected",
        ),
        (
            lambda t: t.update({Q[:-7] + ".rms_norm.weight": np.ones(16, np.float32)}),
            "rms_norm.weight is unexpected",
        ),
        (
            lambda t: t.update({Q: np.ones((16, 16), np.uint8)}),
            rf"{Q} is uint8\[16,16\] instead of uint8\[4,16\]",
        ),
        (
            lambda t: t.update({Q: np.ones((16, 16), np.float32)}),
            rf"{Q} is float32\[16,16\] instead of uint8\[4,16\]",
        ),
        (
            lambda t: t.update({EMBEDDING: np.ones((28, 16), np.float32)}),
            rf"{EMBEDDING} is float32\[28,16\] instead of floats of shape \[29, 16\]",
        ),
        (
            lambda t: t.update({EMBEDDING: np.ones((29, 16), np.int32)}),
            rf"{EMBEDDING} is int32\[29,16\] instead of floats",
        ),
        (
            lambda t: t.update({SCALE: np.ones(16, np.float32)}),
            rf"{SCALE} is float32\[16\] instead of",
        ),
        (set_value(SCALE, np.nan), f"{SCALE} in .* not finite"),
        (set_value(SCALE, 0.0), f"{SCALE} of .* is no scale.*a positive finite number"),
        (set_value(SCALE, -1.0), f"{SCALE} of .* is no scale"),
        (set_value(SCALE, 1e-40), f"{SCALE} of .* is no scale"),
        (set_value(EMBEDDING, np.inf), f"{EMBEDDING} in .* not finite"),
        (set_value(Q, 0b00001100), f"cannot use {Q}.*no packed ternary codes"),
        (lambda t: t.update(extra=np.ones(2, np.float64)), "extra in .* unknown dtype"),
    ],
)
def test_other_tensors_are_refused(folder, change, message):
    rewrite(folder / "model.safetensors", change)
    with pytest.raises(FabricError, match=message):
        read_all(folder)


def test_float_codes_that_are_none(tmp_path):
    hf_folder.write_problem(tmp_path, "bitnet-silu-offline")
    codes = np.zeros((16, 16), np.float32)
    codes[3, 3] = 0.5
    rewrite(tmp_path / "model.safetensors", lambda t: t.update({Q: codes}))
    with pytest.raises(FabricError, match=f"cannot use {Q}.*no ternary codes; expected -1, 0 or 1"):
        read_all(tmp_path)


def test_too_few_layers(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with pytest.raises(FabricError, match="lacks layers; expected 1000000000; found 2"):
        open_huggingface(folder)
    path.write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(FabricError, match=r"model\.layers\.1\.\S+ is unexpected; .*and \d+ more"):
        open_huggingface(folder)


def write_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    [
        "../other.safetensors",
        "/etc/other.safetensors",
        "sub/model.safetensors",
        "C:\\model.safetensors",
        "model.bin",
        ".safetensors",
        "a\0b.safetensors",
        "a" * 300 + ".safetensors",
        7,
        None,
    ],
)
def test_shards_outside_the_folder(sharded, name):
    (sharded.parent / "other.safetensors").write_bytes(b"secret")
    write_index(sharded, lambda places: places.update({Q: name}))
    with pytest.raises(FabricError, match="names a shard that can't be one"):
        open_shards(sharded)


def test_a_missing_shard(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FabricError, match=r"are missing: model-00002-of-00003\.safetensors"):
        open_shards(sharded)


def test_a_shard_of_another_model(sharded):
    def change(tensors):
        tensors["other"] = np.ones(2, np.float32)

    rewrite(sharded / "model-00001-of-00003.safetensors", change)
    with pytest.raises(FabricError, match="does not agree with its shards about other"):
        open_shards(sharded)


def test_an_index_of_another_model(sharded):
    first = "model-00001-of-00003.safetensors"
    write_index(sharded, lambda places: places.update({"other": first}))
    with pytest.raises(FabricError, match="does not agree with its shards about other"):
        open_shards(sharded)


def test_a_tensor_in_two_shards(sharded):
    tensors = load_file(sharded / "model-00001-of-00003.safetensors")
    name = next(iter(tensors))
    rewrite(sharded / "model-00002-of-00003.safetensors", lambda t: t.update({name: tensors[name]}))
    with pytest.raises(FabricError, match=f"{name} is in two shards"):
        open_shards(sharded)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{"])
def test_an_index_without_places(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(FabricError, match=r"index\.json"):
        open_shards(sharded)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "cannot read"),
        (lambda content: content + b"\0", "cannot read"),
        (lambda content: content[:4], "cannot read"),
        (lambda content: b"", "cannot read"),
        (lambda content: struct.pack("<Q", 1 << 62) + content[8:], "header of .* is too large"),
        (lambda content: struct.pack("<Q", 1 << 22) + content[8:], "cannot read"),
        (lambda content: content.replace(b'"F32"', b'"F99"', 1), "cannot read"),
        (lambda content: content.replace(b"[29,16]", b"[30,16]", 1), "cannot read"),
    ],
)
def test_damaged_files(folder, damage, message):
    path = folder / "model.safetensors"
    damaged = damage(path.read_bytes())
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    with pytest.raises(FabricError, match=message):
        open_huggingface(folder)


def test_a_file_that_shrinks_while_it_is_read(folder):
    source = open_huggingface(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(FabricError, match="the file ends early"):
        source.linear("mlp.down", 1)


def test_pickles_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FabricError, match=r"pickles, which can run any code.*pytorch_model\.bin"):
        open_huggingface(folder)


def test_a_folder_of_another_format(folder):
    (folder / "model.safetensors").rename(folder / "model-q4.gguf")
    with pytest.raises(FabricError, match=r"Name \S+model-q4\.gguf itself"):
        open_huggingface(folder)
    (folder / "model-q4.gguf").unlink()
    with pytest.raises(FabricError, match="has no weights"):
        open_huggingface(folder)
