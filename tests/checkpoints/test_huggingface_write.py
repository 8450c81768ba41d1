"""Exports in the layout of transformers, against transformers and against our reader."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fabric_jax.checkpoints.huggingface.read import open_huggingface
from fabric_jax.checkpoints.huggingface.write import masters_of, reciprocal, write_huggingface
from fabric_jax.checkpoints.huggingface.write_config import family_of, model_settings
from fabric_jax.checkpoints.native import save_model
from fabric_jax.checkpoints.source import TernaryMatrix
from fabric_jax.checkpoints.ternary import pack_codes
from fabric_jax.errors import FabricError
from fabric_jax.layers.rope import RopeScaling
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from tests.checkpoints.tree_source import TreeSource, assert_same_tensors, source_of
from tests.models import baseline_models, hf_oracle, running
from tests.models.hf_mapping import to_base
from tests.models.tiny_problems import PROBLEMS, Problem, Size, make_problem

SMALL = Size(vocab=37, layers=2, hidden=16, ffn=24, heads=2, kv_heads=1, length=9)
MIDDLE = Size(vocab=61, layers=2, hidden=32, ffn=48, heads=4, kv_heads=2, length=11)
PACKED = ["bitnet-relu2-offline", "bitnet-silu-offline", "llama-bitlinear"]


def load(folder: Path, problem: Problem | None = None, dtype: str = "float32") -> Any:
    """What transformers makes of a folder; every tensor of either side has its place."""
    import torch
    import transformers

    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    model = model.to(torch.float32).eval()
    if problem is not None:
        # torch's float32 powers are off by an ulp or two.
        size = problem.config.head_dim
        exact = problem.config.rope_theta ** -(np.arange(0, size, 2) / size)
        model.model.rotary_emb.inv_freq = torch.from_numpy(exact.astype(np.float32))
    return model


def assert_its_logits(problem: Problem, model: Any, bound: float = 2e-5) -> None:
    """Ours op by op, on tokens whose int8 codes agree, as do those of all tokens before."""
    inputs = hf_oracle.recorded_inputs(model, problem.tokens)
    theirs = {name: hf_oracle.codes(x) for name, x in inputs.items() if name.endswith("_proj")}
    keep = np.ones(problem.tokens.shape, bool)
    if problem.storage != "float":
        keep = running.untouched_tokens(running.activation_codes(problem), theirs)
    assert keep.mean() > 0.4
    expected = hf_oracle.run(model, problem.tokens)["logits"]
    found = np.asarray(running.logits(problem))
    assert expected.std() > 3
    np.testing.assert_allclose(found[keep], expected[keep], rtol=0, atol=bound)


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("name", "shard_bytes"), [*((name, 1 << 40) for name in PACKED), (PACKED[0], 9000)]
)
def test_packed_exports_give_our_logits_in_transformers(name, shard_bytes, tmp_path, oracle):
    oracle("torch", "transformers", "accelerate")
    problem = make_problem(name, MIDDLE)
    write_huggingface(source_of(problem), tmp_path / "m", packed=True, shard_bytes=shard_bytes)
    files = sorted(path.name for path in (tmp_path / "m").iterdir())
    assert ("model.safetensors" in files) == (shard_bytes > 1 << 30)
    assert_its_logits(problem, load(tmp_path / "m", problem))


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["bitnet-relu2-online", "bitnet-silu-online", "llama-float"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float_exports_give_our_logits_in_transformers(name, dtype, tmp_path, oracle):
    oracle("torch", "transformers", "accelerate")
    problem = make_problem(name, MIDDLE)
    write_huggingface(source_of(problem), tmp_path / "m", packed=False, dtype=dtype)
    rounded = {
        tensor: array.astype(dtype if dtype == "float32" else ml_dtypes.bfloat16).astype(np.float32)
        for tensor, array in problem.state.items()
    }
    # Without quantisers activations are larger: even numpy and torch differ by 5e-4 there.
    bound = 5e-4 if name == "llama-float" else 2e-5
    assert_its_logits(replace(problem, state=rounded), load(tmp_path / "m", problem), bound)


@pytest.mark.oracle
@pytest.mark.parametrize("name", PACKED)
def test_packed_weights_as_masters_give_the_same_model(name, tmp_path, oracle):
    """absmean of codes · s/p is s up to the rounding of a sum, so the bound is wider."""
    oracle("torch", "transformers", "accelerate")
    problem = make_problem(name, MIDDLE)
    write_huggingface(source_of(problem), tmp_path / "m", packed=False)
    assert_its_logits(problem, load(tmp_path / "m", problem), 5e-5)


@pytest.mark.oracle
@pytest.mark.parametrize("name", baseline_models.CONFIGS)
def test_baselines_give_the_logits_of_transformers(name, tmp_path, oracle):
    (torch,) = oracle("torch", "transformers")[:1]
    config = baseline_models.CONFIGS[name]
    theirs = baseline_models.hf_model(config)
    tree = baseline_models.our_tree(config, theirs)
    source = TreeSource(config=config, form="float", tree=tree)
    write_huggingface(source, tmp_path / "m", packed=False)
    tokens = torch.from_numpy(baseline_models.tokens_of(config)).long()
    again = load(tmp_path / "m")
    with torch.no_grad():
        expected, found = theirs(tokens).logits.numpy(), again(tokens).logits.numpy()
    np.testing.assert_array_equal(found, expected)
    assert_same_tensors(open_huggingface(tmp_path / "m"), source)


@pytest.mark.oracle
def test_a_bfloat16_export_runs_in_bfloat16(tmp_path, oracle):
    torch, transformers, _ = oracle("torch", "transformers", "accelerate")
    for name in PACKED:
        problem = make_problem(name, SMALL)
        folder = tmp_path / name
        write_huggingface(source_of(problem), folder, packed=True, dtype="bfloat16")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert model.dtype == torch.bfloat16
        assert torch.isfinite(model(torch.from_numpy(problem.tokens).long()).logits).all()


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("shard_bytes", [1 << 40, 2000], ids=["whole", "sharded"])
def test_our_reader_gets_every_tensor_back_bit_for_bit(name, shard_bytes, tmp_path):
    problem = make_problem(name, SMALL)
    source = source_of(problem)
    packed = problem.mode == "packed"
    write_huggingface(source, tmp_path / "m", packed=packed, shard_bytes=shard_bytes)
    assert_same_tensors(open_huggingface(tmp_path / "m", mode="master"), source)
    largest = max(a.nbytes for a in problem.state.values()) if shard_bytes == 2000 else 1 << 40
    for path in (tmp_path / "m").glob("*.safetensors"):
        assert path.stat().st_size < max(largest, shard_bytes) + 4000


def test_the_index_names_every_tensor_once(tmp_path):
    source = source_of(make_problem("llama-bitlinear", SMALL))
    write_huggingface(source, tmp_path / "m", packed=True, shard_bytes=2000)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in (tmp_path / "m").glob("*.safetensors")}
    assert len(shards) > 2
    assert index["weight_map"] == {name: file for file, held in shards.items() for name in held}
    total = sum(array.nbytes for held in shards.values() for array in held.values())
    assert index["metadata"]["total_size"] == total
    write_huggingface(source, tmp_path / "m", packed=True)
    assert [path.name for path in (tmp_path / "m").glob("*.safetensors*")] == ["model.safetensors"]


@settings(deadline=None)
@given(st.floats(1e-5, 1e4).map(np.float32))
def test_reciprocals_of_reciprocals_are_exact(stored):
    """Whatever a checkpoint divides by, or absmean gives: 1/r in float32 comes back as r or as
    another number with the same reciprocal."""
    scale = np.float32(1) / stored
    assert np.float32(1) / reciprocal(float(scale)) == scale


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 999),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    density=st.floats(0.01, 1),
    scale=st.floats(1e-3, 10).map(np.float32).map(float),
)
def test_masters_have_the_codes_and_the_scale_that_they_were_made_of(seed, shape, density, scale):
    random = np.random.default_rng(seed)
    codes = np.where(random.random(shape) < density, random.choice([-1, 1], shape), 0)
    matrix = TernaryMatrix(packed=pack_codes(codes), scale=scale, k=shape[1])
    masters = masters_of(matrix)
    half = masters.astype(ml_dtypes.bfloat16)
    for weights, bound in ((masters, 1e-6), (half, 2**-8)):
        found = np.abs(weights.astype(np.float64)).mean()
        assert found == pytest.approx(scale if codes.any() else 0, rel=bound)
        again = np.clip(np.rint(weights / max(found, 1e-5)), -1, 1)
        np.testing.assert_array_equal(again, codes)


def test_the_configuration_is_complete():
    config = make_problem("bitnet-relu2-offline", SMALL).config
    settings_ = model_settings(config, "packed", dtype="bfloat16", tokens={"bos_token_id": 1})
    assert settings_["quantization_config"] == {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": ["lm_head"],
    }
    assert (settings_["model_type"], settings_["hidden_act"]) == ("bitnet", "relu2")
    # Tools older than transformers 5 look here; without it 2B-4T has the wrong positions.
    assert settings_["rope_theta"] == settings_["rope_parameters"]["rope_theta"] == 500_000.0
    llama = make_problem("llama-bitlinear", SMALL).config
    kinds = {
        form: model_settings(llama, form, dtype="float32", tokens={})["quantization_config"]
        for form in ("packed", "master")
    }
    assert kinds["packed"]["linear_class"] == "bitlinear"
    assert kinds["master"]["quantization_mode"] == "online"
    assert "quantization_config" not in model_settings(llama, "float", dtype="float32", tokens={})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qk_norm": True, "sub_norms": True}, "no architecture for bitnet-relu2-offline"),
        ({"norm_offset": 1.0}, "no architecture.*norm_offset 1.0"),
        ({"embedding_scale": True}, "no architecture"),
        ({"attention_scale": 0.1}, "bitnet of transformers does not compute.*attention_scale 0.1"),
        ({"head_dim": 12}, "its sub-norms are as wide as the model.*found 2 heads of 12"),
        ({"sliding_window": 4, "global_every": 2}, "does not compute.*sliding_window 4"),
    ],
)
def test_what_transformers_has_no_code_for_is_refused(change, message):
    config = replace(make_problem("bitnet-relu2-offline", SMALL).config, **change)
    with pytest.raises(FabricError, match=message):
        family_of(config)
    gemma = replace(baseline_models.GEMMA3, attention_scale=0.3)
    with pytest.raises(FabricError, match=r"whole number; found 0\.3"):
        family_of(gemma)


def test_scaled_positions_are_read_back(tmp_path):
    problem = make_problem("llama-float", SMALL)
    for scaling in (
        RopeScaling(kind="linear", factor=8.0),
        RopeScaling(
            kind="llama3", factor=8.0, low_freq_factor=1, high_freq_factor=4, original_length=32
        ),
    ):
        config = replace(problem.config, rope_scaling=scaling)
        write_huggingface(source_of(problem, config=config), tmp_path / "m", packed=False)
        assert open_huggingface(tmp_path / "m").config.rope_scaling == scaling


def odd_rows(problem: Problem) -> TreeSource:
    """One whose feed-forward has 22 rows, which quarters don't hold."""
    config = replace(problem.config, ffn_size=22)
    return source_of(problem, config=config)


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    packed, master = (make_problem(f"bitnet-silu-{s}", SMALL) for s in ("offline", "online"))
    folder = tmp_path / "m"
    with pytest.raises(FabricError, match=r"mlp.gate with 22, mlp.up with 22"):
        write_huggingface(odd_rows(packed), folder, packed=True)
    with pytest.raises(FabricError, match="memory holds master weights"):
        write_huggingface(source_of(master), folder, packed=True)
    broken = master.base()
    broken["final_norm"]["gain"] *= jnp.nan
    with pytest.raises(FabricError, match=r"model.norm.weight has values that are not finite"):
        write_huggingface(source_of(master, tree=broken), folder, packed=False)
    assert list(tmp_path.iterdir()) == []


def test_only_a_folder_of_the_same_kind_is_replaced(tmp_path: Path) -> None:
    problem = make_problem("bitnet-silu-offline", SMALL)
    folder = tmp_path / "m"
    definition = define_decoder(problem.config, DecoderOptions())
    save_model(folder, definition, problem.base(), tokenizer_json=None)
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(FabricError, match="holds a model in another format"):
        write_huggingface(source_of(problem), folder, packed=True)
    assert (folder / "model.safetensors").read_bytes() == before
    other = tmp_path / "other"
    write_huggingface(source_of(problem), other, packed=True)
    write_huggingface(source_of(problem), other, packed=False)
    (other / "notes.txt").write_text("mine")
    with pytest.raises(FabricError, match=r"holds other files.*notes.txt"):
        write_huggingface(source_of(problem), other, packed=True)


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["<s>", "</s>", "<pad>", "<|end|>", "a", "b", "c"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>", "<pad>", "<|end|>"])
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "t")
    special = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(special))
    (tmp_path / "t" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "t" / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    problem = make_problem("llama-float", SMALL)
    source = source_of(problem, tokenizer_source=str(tmp_path / "t"))
    write_huggingface(source, tmp_path / "m", packed=False)
    for path in (tmp_path / "t").iterdir():
        assert (tmp_path / "m" / path.name).read_bytes() == path.read_bytes()
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, [1, 3])


@pytest.mark.oracle
def test_a_tokenizer_without_settings_gets_them(tmp_path: Path, oracle) -> None:
    (transformers,) = oracle("transformers")
    make_tokenizer(tmp_path / "t")
    problem = make_problem("llama-float", SMALL)
    source = source_of(problem, tokenizer_source=str(tmp_path / "t" / "tokenizer.json"))
    write_huggingface(source, tmp_path / "m", packed=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer("a c b", add_special_tokens=False).input_ids == [4, 6, 5]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    generation = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def test_hf_mapping_agrees_about_names(tmp_path: Path) -> None:
    """The mapping of the other oracle tests, written apart from ours."""
    problem = make_problem("bitnet-silu-online", SMALL)
    write_huggingface(source_of(problem), tmp_path / "m", packed=False)
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert stored.keys() == problem.state.keys()
    tree = to_base(stored, problem.config)
    assert_same_tensors(source_of(problem, tree=tree), source_of(problem))
