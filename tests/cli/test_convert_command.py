import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fabric_jax.checkpoints.loading import open_source
from fabric_jax.checkpoints.native import save_model
from fabric_jax.cli.arguments import parse
from fabric_jax.conversion import ConvertConfig
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.initialize import initialize_base
from fabric_jax.models.registry import REGISTRY


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights that the name bitnet-tiny stands for, in a folder."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    definition = define_decoder(REGISTRY["bitnet-tiny"], DecoderOptions())
    save_model(folder, definition, initialize_base(definition, 0), tokenizer_json=None)
    return folder


def test_help_explains_every_flag(fabric):
    text = re.sub(r"[│\s]+", " ", fabric("convert", "--help").out)
    for field in dataclasses.fields(ConvertConfig):
        flag = "--" + field.name.replace("_", "-")
        assert re.search(rf" {flag}(?:, --no\S+)?(?: [A-Z]+| \{{[^}}]+\}})? \w\S* \w+", text), flag


def test_model_and_output_are_the_first_words():
    config = parse(ConvertConfig, "convert", ["m", "o", "--to", "native", "--shard-gb", "2"])
    assert (config.model, config.output, config.shard_gb) == ("m", "o", 2.0)
    named = ["--to", "native", "--model", "m", "--output", "o", "--shard-gb", "2"]
    assert parse(ConvertConfig, "convert", named) == config
    with pytest.raises(SystemExit):
        parse(ConvertConfig, "convert", ["m", "o", "extra", "--to", "native"])


def test_a_model_goes_out_and_comes_back(fabric, model: Path, tmp_path: Path):
    report = tmp_path / "figures.json"
    out = tmp_path / "hf"
    outcome = fabric("convert", model, out, "--to", "hf-packed", "--json", report)
    assert outcome.code == 0, outcome.err
    figures = json.loads(report.read_text())
    assert f"{figures['sizes']['bits_per_weight']:.4f}" in outcome.out
    assert str(out) in outcome.out
    assert figures["sizes"]["total"] == sum(p.stat().st_size for p in out.iterdir())
    assert fabric("convert", out, tmp_path / "back", "--to", "native").code == 0
    weights = "model.safetensors"
    assert (tmp_path / "back" / weights).read_bytes() == (model / weights).read_bytes()


def test_a_converted_adapter_is_evaluated_as_the_first(
    fabric, model: Path, tuned: Path, held_out: Path, tmp_path: Path
):
    adapter = tmp_path / "adapter.gguf"
    given = ("--to", "gguf-adapter", "--adapter", tuned / "adapter")
    outcome = fabric("convert", model, adapter, *given)
    assert outcome.code == 0, outcome.err

    def loss(path: Path) -> Any:
        report = tmp_path / "evaluation.json"
        small = ("--max-length", "48", "--batch-size", "4", "--by", "none")
        given = ("--data", held_out, "--adapter", path, "--json", report, *small)
        assert fabric("evaluate", "--model", model, *given).code == 0
        return json.loads(report.read_text())["adapter"]["loss"]

    assert loss(adapter) == loss(tuned / "adapter")


def test_the_damage_of_a_merge_is_printed(fabric, model: Path, tuned: Path, tmp_path: Path):
    (tmp_path / "t.txt").write_text("Q: Is 7 even?\nA: No.\n" * 4)
    report = tmp_path / "figures.json"
    given = ("--to", "hf-packed", "--adapter", tuned / "adapter", "--reternarise")
    given = (*given, "--text", tmp_path / "t.txt", "--text-length", "44", "--json", report)
    outcome = fabric("convert", model, tmp_path / "m", *given)
    assert outcome.code == 0, outcome.err
    damage = json.loads(report.read_text())["damage"]
    for key in ("kl_mean", "kl_median", "kl_p99", "kl_max", "perplexity_after"):
        assert f"{damage[key]:.4g}" in outcome.out
    assert f"{damage['top1_agreement']:.2%}" in outcome.out
    assert damage["positions"] == 21 * 4
    assert damage["kl_mean"] > 0
    assert damage["perplexity_before"] < damage["perplexity_base"]


def test_wrong_input_is_one_message(refused, model: Path, tuned: Path, tmp_path: Path):
    def message(*words: Any) -> str:
        text = refused("convert", *words)
        assert sorted(p.name for p in tmp_path.iterdir()) == before
        return text

    (tmp_path / "file").write_text("mine")
    before = sorted(p.name for p in tmp_path.iterdir())
    out, adapter = tmp_path / "o", ("--adapter", tuned / "adapter")
    assert "weights are random" in message("bitnet-tiny", out, "--to", "native")
    assert "does not exist" in message(tmp_path / "none", out, "--to", "native")
    assert "is no file" in message(model, out, "--to", "native", "--json", tmp_path)
    assert "is what is read" in message(model, model, "--to", "hf-packed")
    assert "is a file" in message(model, tmp_path / "file", "--to", "hf-packed")
    assert "ends in .gguf" in message(model, out, "--to", "gguf-tq2_0")
    assert "--reternarise" in message(model, out, "--to", "hf-packed", *adapter)
    assert "format of adapters" in message(model, out, "--to", "peft")
    assert "adapter_config.json" in message(model, out, "--to", "peft", "--adapter", tmp_path)
    missing = ("--adapter", tmp_path / "none.gguf")
    assert "none.gguf does not exist" in message(model, out, "--to", "peft", *missing)
    assert "is an adapter" in message(tuned / "adapter", out, "--to", "native")
    text = ("--reternarise", "--text", tmp_path / "none.txt")
    assert "none.txt" in message(model, out, "--to", "hf-packed", *adapter, *text)
    assert open_source(model).form == "packed"
