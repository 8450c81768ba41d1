"""Folders of transformers against the numbers that were put into them; needs no torch."""

import json
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest

from fabric_jax.checkpoints.assemble import in_form
from fabric_jax.checkpoints.huggingface.read import open_huggingface
from fabric_jax.checkpoints.loading import load_base
from fabric_jax.checkpoints.source import TernaryMatrix
from fabric_jax.data.tokenizer import load_tokenizer
from fabric_jax.errors import FabricError
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.packing import pack_base
from tests.checkpoints import hf_folder
from tests.models.tiny_problems import PROBLEMS, make_problem

TERNARY = [name for name in PROBLEMS if name != "llama-float"]
PACKED = ["bitnet-relu2-offline", "bitnet-silu-offline", "llama-bitlinear"]


def assert_equal(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def write(tmp_path, name, change=None, **settings):
    """A folder whose configuration and tensors ``change(config, tensors)`` has changed."""
    problem = make_problem(name, hf_folder.TINY)
    config, tensors = hf_folder.config_of(problem), hf_folder.tensors_of(problem)
    if change is not None:
        change(config, tensors)
    hf_folder.write(tmp_path / "model", config, tensors, **settings)
    return tmp_path / "model", problem


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_tree_is_what_the_files_hold(tmp_path, name, shards):
    folder, problem = write(tmp_path, name, shards=shards)
    loaded = load_base(folder, mode=problem.mode)
    assert loaded.definition.config == replace(problem.config, name="model")
    assert loaded.definition.options.mode == problem.mode
    assert loaded.tokenizer_source == ""
    assert_equal(loaded.base, problem.base())


@pytest.mark.parametrize("name", ["bitnet-relu2-online", "bitnet-silu-online"])
def test_masters_are_packed_by_default(tmp_path, name):
    folder, problem = write(tmp_path, name)
    definition = define_decoder(problem.config, DecoderOptions(mode="master"))
    assert load_base(folder).definition.options.mode == "packed"
    assert_equal(load_base(folder).base, pack_base(definition, problem.base())[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16])
def test_floats_of_16_bits(tmp_path, stored, dtype):
    def change(config, tensors):
        for name, array in tensors.items():
            if array.dtype == np.float32:
                tensors[name] = array.astype(stored)

    folder, problem = write(tmp_path, "llama-bitlinear", change)
    base = load_base(folder, dtype=dtype).base
    expected = problem.state["model.embed_tokens.weight"].astype(stored).astype(dtype)
    np.testing.assert_array_equal(base["embedding"], expected)
    assert base["embedding"].dtype == dtype
    # Powers of two are the same in all formats.
    scale = problem.scales["model.layers.1.mlp.down_proj"]
    assert float(base["layers"]["mlp"]["down"]["scale"][1]) == scale
    assert base["layers"]["mlp"]["down"]["scale"].dtype == np.float32


def test_one_number_has_two_meanings(tmp_path):
    """The same bytes, by the class of linear that the configuration names and nothing else."""
    found = {}
    for kind in ("bitlinear", "autobitlinear"):

        def change(config, tensors, kind=kind):
            config["quantization_config"] = {"quant_method": "bitnet", "linear_class": kind}
            for name in tensors:
                if name.endswith("weight_scale"):
                    tensors[name] = np.array([40.0], np.float32)

        folder, _ = write(tmp_path / kind, "llama-bitlinear", change)
        found[kind] = open_huggingface(folder).linear("attention.q", 0).scale
    assert found == {"bitlinear": float(np.float32(1) / np.float32(40)), "autobitlinear": 40.0}


def test_what_transformers_saves_unpacked(tmp_path):
    """A model loaded with autobitlinear offline is written with float codes."""

    def change(config, tensors):
        problem = make_problem("bitnet-silu-offline", hf_folder.TINY)
        for module in problem.scales:
            tensors[f"{module}.weight"] = problem.state[f"{module}.weight"]

    folder, problem = write(tmp_path, "bitnet-silu-offline", change)
    assert_equal(load_base(folder).base, problem.base())


def rename_to_1bitllm(config, tensors):
    config |= {"model_type": "llama", "architectures": ["BitnetForCausalLM"]}
    config |= {"weight_bits": 1, "input_bits": 8}
    del config["quantization_config"]
    for name in list(tensors):
        for own, theirs in (
            ("self_attn.attn_sub_norm", "self_attn.inner_attn_ln"),
            ("mlp.ffn_sub_norm", "mlp.ffn_layernorm"),
        ):
            if own in name:
                tensors[name.replace(own, theirs)] = tensors.pop(name)
    for layer in range(config["num_hidden_layers"]):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)


def test_1bitllm(tmp_path):
    """They call themselves llama and are known by the names of their sub-norms."""
    folder, problem = write(tmp_path, "bitnet-silu-online", rename_to_1bitllm)
    loaded = load_base(folder, mode="master")
    assert loaded.definition.config == replace(problem.config, name="model")
    assert_equal(loaded.base, problem.base())
    assert load_base(folder).definition.options.mode == "packed"


def test_masters_that_do_not_say_so(tmp_path):
    """A plain Llama is float; that it holds masters is for the caller to say."""
    folder, problem = write(tmp_path, "llama-float")
    assert load_base(folder).definition.options.mode == "float"
    assert not load_base(folder).definition.config.ternary
    for mode in ("master", "packed"):
        loaded = load_base(folder, mode=mode)
        assert loaded.definition.config.ternary
        assert loaded.definition.options.mode == mode
    config = replace(problem.config, ternary=True)
    definition = define_decoder(config, DecoderOptions(mode="master"))
    assert_equal(load_base(folder, mode="packed").base, pack_base(definition, problem.base())[1])


@pytest.mark.parametrize("by", ["model_type", "key"])
def test_ternary_models_without_a_quantisation_must_be_told(tmp_path, by):
    def change(config, tensors):
        config.pop("quantization_config", None)
        if by == "key":
            config["is_bitnet_config"] = True

    name = "bitnet-relu2-online" if by == "model_type" else "llama-float"
    folder, problem = write(tmp_path, name, change)
    with pytest.raises(FabricError, match=r'masters.*or plain.*weights="packed" or "master"'):
        load_base(folder)
    config = replace(problem.config, name="model", ternary=False)
    assert load_base(folder, mode="float").definition.config == config
    assert load_base(folder, mode="master").definition.config == replace(config, ternary=True)


def test_a_copy_of_a_tied_head_is_ignored(tmp_path):
    def change(config, tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    folder, problem = write(tmp_path, "bitnet-relu2-offline", change)
    assert_equal(load_base(folder).base, problem.base())


def test_rows_that_are_no_multiple_of_four(tmp_path):
    """The fields past the last row hold bits 0, which would be code -1."""

    def change(config, tensors):
        config["intermediate_size"] = 22
        codes = np.random.default_rng(0).integers(-1, 2, (3, 22, 16))
        for layer in range(2):
            start = f"model.layers.{layer}.mlp"
            tensors[f"{start}.gate_proj.weight"] = hf_folder.quarter_rows(codes[0])
            tensors[f"{start}.up_proj.weight"] = hf_folder.quarter_rows(codes[1])
            tensors[f"{start}.down_proj.weight"] = hf_folder.quarter_rows(codes[2].T)
            if f"{start}.ffn_sub_norm.weight" in tensors:
                tensors[f"{start}.ffn_sub_norm.weight"] = np.ones(22, np.float32)

    folder, _ = write(tmp_path, "bitnet-silu-offline", change)
    codes = np.random.default_rng(0).integers(-1, 2, (3, 22, 16))
    source = open_huggingface(folder)
    for path, expected in (("mlp.up", codes[1]), ("mlp.down", codes[2].T)):
        matrix = source.linear(path, 1)
        assert isinstance(matrix, TernaryMatrix)
        fields = [
            (int(byte) >> 2 * i) & 3 for row in matrix.packed for byte in row for i in range(4)
        ]
        whole = np.array(fields).reshape(len(expected), -1)
        np.testing.assert_array_equal(whole[:, : matrix.k] - 1, expected)
        assert (whole[:, matrix.k :] == 1).all()


def test_a_source_is_read_in_any_order(tmp_path):
    folder, problem = write(tmp_path, "bitnet-relu2-online")
    source = open_huggingface(folder)
    name = "model.layers.1.self_attn.k_proj.weight"
    for _ in range(2):
        np.testing.assert_array_equal(source.linear("attention.k", 1), problem.state[name])
    rows = source.tensor("embedding", rows=slice(3, 8))
    np.testing.assert_array_equal(rows, problem.state["model.embed_tokens.weight"][3:8])
    packed = in_form(source, None)
    assert packed.form == "packed"
    assert packed.linear("attention.k", 1).packed.dtype == np.uint8
    assert packed.tensor("layers.mlp.sub_norm.gain", 1).shape == (24,)


def test_tokenizer_of_the_folder(tmp_path):
    folder, _ = write(tmp_path, "llama-bitlinear")
    (folder / "tokenizer.json").write_text("{}")
    assert load_base(folder).tokenizer_source == str(folder)


@pytest.mark.parametrize(
    ("generation", "config", "stops"),
    [({"eos_token_id": [7, 9]}, 5, (3, 7, 9)), ({}, [5, 6], (3, 5, 6)), (None, 5, (3, 5))],
)
def test_tokens_that_end_an_answer(tmp_path, generation, config, stops):
    """Of generation_config.json, else of config.json, and the vocabulary's own."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {str(number): number for number in range(3)} | {"</s>": 3}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="0")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert load_tokenizer(tmp_path).stop_ids == stops
