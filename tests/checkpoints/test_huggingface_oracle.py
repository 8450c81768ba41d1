"""Folders made with transformers: what it computes from them and what we do, in float32."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from fabric_jax.checkpoints.loading import load_base
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.packing import pack_base
from tests.checkpoints.test_huggingface_read import rename_to_1bitllm
from tests.models import baseline_models, hf_oracle, running
from tests.models.tiny_problems import PROBLEMS, Problem, Size, make_problem

pytestmark = [pytest.mark.oracle, pytest.mark.xdist_group("huggingface-oracle")]
Oracle = Callable[..., list[ModuleType]]
SMALL = Size(vocab=61, layers=2, hidden=32, ffn=56, heads=4, kv_heads=2, length=13)


@pytest.fixture(autouse=True)
def _oracles(oracle: Oracle) -> None:
    oracle("torch", "transformers", "accelerate")


@dataclass(frozen=True, kw_only=True)
class FromDisk(Problem):
    """A problem whose base tree is what we read."""

    tree: dict[str, Any]

    def base(self) -> dict[str, Any]:
        return self.tree


def from_disk(problem: Problem, folder: Path, **options: Any) -> FromDisk:
    loaded = load_base(folder, **options)
    same = replace(loaded.definition.config, name=problem.config.name)
    assert same == problem.config
    values = {name: getattr(problem, name) for name in problem.__dataclass_fields__}
    if loaded.definition.options.mode == "packed":
        values["storage"] = "offline"
    return FromDisk(**values, tree=loaded.base)


def assert_same_logits(model: Any, ours: FromDisk) -> None:
    """Where no activation code differs, as in tests/models/test_hf_parity.py.

    Without sub-norms nothing bounds what large float weights put out: there the error is compared
    with the largest logit.
    """
    expected = hf_oracle.run(model, ours.tokens)["logits"]
    found = np.asarray(running.logits(ours))
    assert expected.std() > 2
    keep, bound = np.ones(ours.tokens.shape, bool), 2e-5
    if ours.storage != "float":
        inputs = hf_oracle.recorded_inputs(model, ours.tokens)
        theirs = {name: hf_oracle.codes(x) for name, x in inputs.items() if name.endswith("_proj")}
        keep = running.untouched_tokens(running.activation_codes(ours), theirs)
    if ours.config.name == "llama-float":
        bound *= float(np.abs(expected).max())
    assert keep.mean() > 0.4
    np.testing.assert_allclose(found[keep], expected[keep], rtol=0, atol=bound)


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_convention(name: str, tmp_path: Path) -> None:
    problem = make_problem(name, SMALL)
    model = hf_oracle.load_model(problem, tmp_path)
    assert_same_logits(model, from_disk(problem, tmp_path, mode=problem.mode))


@pytest.mark.parametrize("name", ["bitnet-relu2-online", "bitnet-silu-online"])
def test_masters_packed_as_they_are_loaded(name: str, tmp_path: Path) -> None:
    problem = make_problem(name, SMALL)
    model = hf_oracle.load_model(problem, tmp_path)
    assert_same_logits(model, from_disk(problem, tmp_path))


def test_1bitllm(tmp_path: Path) -> None:
    """Their own code is BitNetForCausalLM with SiLU under other names."""
    from safetensors.numpy import load_file, save_file

    problem = make_problem("bitnet-silu-online", SMALL)
    model = hf_oracle.load_model(problem, tmp_path / "oracle")
    config = json.loads((tmp_path / "oracle" / "config.json").read_text())
    tensors = load_file(tmp_path / "oracle" / "model.safetensors")
    rename_to_1bitllm(config, tensors)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "theirs" / "model.safetensors")
    assert_same_logits(model, from_disk(problem, tmp_path / "theirs"))


def test_llama_masters_without_a_quantisation(tmp_path: Path) -> None:
    """Falcon-E's ``prequantized``: with the mode said, what autobitlinear computes online."""
    problem = make_problem("llama-float", SMALL)
    hf_oracle.load_model(problem, tmp_path)
    masters = replace(problem, storage="online", config=replace(problem.config, ternary=True))
    model = hf_oracle.load_model(masters, tmp_path / "oracle")
    for mode in ("master", "packed"):
        assert_same_logits(model, from_disk(masters, tmp_path, mode=mode))


def test_float_codes_beside_a_scale(tmp_path: Path) -> None:
    """What autobitlinear makes of a packed file is also read as it is, by both."""
    from safetensors.numpy import load_file, save_file

    problem = make_problem("bitnet-relu2-offline", SMALL)
    hf_oracle.load_model(problem, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {f"{module}.weight": problem.state[f"{module}.weight"] for module in problem.scales}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = transformers_model(tmp_path)
    assert_same_logits(model, from_disk(problem, tmp_path))


def transformers_model(folder: Path) -> Any:
    import torch
    import transformers

    kind = transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.to(torch.float32).eval()


def baseline_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    loaded = load_base(folder)
    assert loaded.definition.options.mode == "float"

    def run(base: dict[str, Any]) -> jax.Array:
        decoder = loaded.definition.bind(base, {})
        return decoder.logits(decoder(*running.whole_rows(tokens)))

    return np.asarray(jax.jit(run)(loaded.base))


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """Within 2e-5 of the largest logit: nothing bounds activations without quantisers."""
    assert expected.std() > 1
    assert np.abs(found - expected).max() / np.abs(expected).max() < 2e-5


def legacy(config: dict[str, Any]) -> dict[str, Any]:
    """The spelling before ``rope_parameters``."""
    config = dict(config)
    rope = config.pop("rope_parameters")
    if "sliding_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        config["sliding_window_pattern"] = 6
        config.pop("layer_types")
        config.pop("_sliding_window_pattern", None)
        rope = rope["full_attention"]
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return config


@pytest.mark.parametrize("spelling", ["new", "legacy"])
@pytest.mark.parametrize("name", baseline_models.CONFIGS)
def test_16_bit_families(name: str, spelling: str, tmp_path: Path) -> None:
    config = baseline_models.CONFIGS[name]
    model = baseline_models.hf_model(config)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    if spelling == "legacy":
        path = tmp_path / "config.json"
        path.write_text(json.dumps(legacy(json.loads(path.read_text()))))
    assert replace(load_base(tmp_path).definition.config, name=config.name) == config
    tokens = baseline_models.tokens_of(config)
    expected = hf_oracle.run(model, tokens)["logits"]
    assert_close(baseline_logits(tmp_path, tokens), expected)


def multimodal() -> Any:
    """A tiny Gemma 3 with a vision tower, float32."""
    import torch
    import transformers

    text = baseline_models.hf_config(baseline_models.GEMMA3).to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=1, image_token_index=96
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.25)
    return model


@pytest.mark.parametrize("layout", ["old", "new"])
def test_text_part_of_a_multimodal_model(layout: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    model = multimodal()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    starts = {name.split(".")[0] for name in tensors}
    old, new = ("language_model.model.", "model.language_model.")
    current = old if any(name.startswith(old) for name in tensors) else new
    wanted = old if layout == "old" else new

    def renamed(name: str) -> str:
        if name.startswith(current):
            return wanted + name.removeprefix(current)
        plain = name.removeprefix("model.")
        return plain if layout == "old" else f"model.{plain}"

    tensors = {renamed(name): array for name, array in tensors.items()}
    assert any("vision_tower" in name for name in tensors), starts
    assert any("multi_modal_projector" in name for name in tensors), starts
    save_file(tensors, file)
    tokens = baseline_models.tokens_of(baseline_models.GEMMA3) % 96
    expected = hf_oracle.run(model, tokens)["logits"]
    assert_close(baseline_logits(tmp_path, tokens), expected)


def test_packing_on_the_way_equals_packing_afterwards(tmp_path: Path) -> None:
    problem = make_problem("bitnet-relu2-online", SMALL)
    hf_oracle.load_model(problem, tmp_path)
    loaded = load_base(tmp_path)
    definition = define_decoder(problem.config, DecoderOptions(mode="master"))
    expected = pack_base(definition, problem.base())[1]
    for found, wanted in zip(jax.tree.leaves(loaded.base), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(found, wanted)
