import dataclasses
import json
import math
from pathlib import Path

import pytest

from fabric_jax.checkpoints.native import save_model
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.initialize import initialize_base
from fabric_jax.models.registry import REGISTRY

SMALL = ("--max-length", "48", "--batch-size", "4")


def test_base_and_adapter_stand_side_by_side(fabric, tuned: Path, held_out: Path, tmp_path: Path):
    report = tmp_path / "figures" / "evaluation.json"
    given = ("--data", held_out, "--adapter", tuned / "adapter", "--json", report, *SMALL)
    outcome = fabric("evaluate", "--model", "bitnet-tiny", *given)
    assert outcome.code == 0, outcome.err
    figures = json.loads(report.read_text())
    run = json.loads((tuned / "summary.json").read_text())
    # The training loop measured the same rows before its first and after its last step.
    assert figures["base"]["loss"] == pytest.approx(run["eval_loss_first"], rel=1e-4)
    assert figures["adapter"]["loss"] == pytest.approx(run["eval_loss_last"], rel=1e-4)
    assert figures["adapter"]["perplexity"] == pytest.approx(math.exp(figures["adapter"]["loss"]))
    for side in ("base", "adapter"):
        assert f"{figures[side]['loss']:.4f}" in outcome.out
        assert figures[side]["total"] == 10
        assert len(figures[side]["answers"]) == 10
    assert "with adapter" in outcome.out
    assert figures["config"]["model"] == "bitnet-tiny"
    assert figures["device"]["platform"] == "cpu"


@pytest.mark.parametrize("by", ["likelihood", "likelihood_per_token"])
def test_likelihood_always_answers_with_a_label(fabric, held_out: Path, tmp_path: Path, by: str):
    report = tmp_path / "evaluation.json"
    given = ("--data", held_out, "--by", by, "--json", report, *SMALL)
    assert fabric("evaluate", "--model", "bitnet-tiny", *given).code == 0
    base = json.loads(report.read_text())["base"]
    assert json.loads(report.read_text())["adapter"] is None
    assert base["format_rate"] == 1
    assert set(base["predictions"]) <= {"Yes", "No"}
    even = [number % 2 == 0 for number in range(100, 110)]
    answers = [answer == "Yes" for answer in base["predictions"]]
    assert base["accuracy"] == pytest.approx(
        sum(a == b for a, b in zip(even, answers, strict=True)) / 10
    )
    assert 0 <= base["accuracy_low"] <= base["accuracy"] <= base["accuracy_high"] <= 1


def test_perplexity_alone_where_asked_or_without_labels(fabric, held_out: Path, tmp_path: Path):
    unlabelled = tmp_path / "text.jsonl"
    unlabelled.write_text('{"text": "a few words"}\n')
    for data, by in ((held_out, "none"), (unlabelled, "generation")):
        outcome = fabric("evaluate", "--model", "bitnet-tiny", "--data", data, "--by", by, *SMALL)
        assert outcome.code == 0, outcome.err
        assert "perplexity" in outcome.out
        assert "accuracy" not in outcome.out


def test_wrong_input_is_one_message(refused, tuned: Path, held_out: Path, tmp_path: Path):
    def message(**flags: object) -> str:
        given = {"model": "bitnet-tiny", "data": held_out, "max-length": 48} | flags
        return refused("evaluate", *(str(w) for k, v in given.items() for w in (f"--{k}", v)))

    assert "Did you mean 'bitnet-tiny'?" in message(model="bitnet-tinny")
    assert f"{tmp_path}/none.jsonl" in message(data=tmp_path / "none.jsonl")
    assert "does not exist" in message(adapter=tmp_path / "none")
    assert "at most 512" in message(**{"max-length": 513})
    assert "/proc/none" in message(json="/proc/none/figures.json", by="none")
    damaged = tmp_path / "adapter"
    damaged.mkdir()
    (damaged / "adapter_config.json").write_bytes(
        (tuned / "adapter" / "adapter_config.json").read_bytes()
    )
    weights = (tuned / "adapter" / "adapter_model.safetensors").read_bytes()
    (damaged / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert str(damaged) in message(adapter=damaged)
    one_class = tmp_path / "one.jsonl"
    one_class.write_text('{"text": "Q: a\\nA: Yes", "label": "Yes"}\n')
    assert "two classes" in message(data=one_class)
    assert "more tokens" in message(tokenizer=large_vocabulary(tmp_path))


def large_vocabulary(folder: Path) -> Path:
    """A tokenizer of a thousand words."""
    from tokenizers import Tokenizer, models

    path = folder / "tokenizer.json"
    words = {f"w{i}": i for i in range(1000)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(path))
    return path


def test_against_compares_two_forms_of_a_model(fabric, refused, held_out: Path, tmp_path: Path):
    report = tmp_path / "against.json"
    shorter = dataclasses.replace(REGISTRY["bitnet-tiny"], max_length=32)
    definition = define_decoder(shorter, DecoderOptions())
    base = initialize_base(definition, 0)
    save_model(tmp_path / "short", definition, base, tokenizer_json=None)
    given = ("--model", "bitnet-tiny", "--data", held_out, *SMALL)
    change = ("--against", "weights=ternary1.6")
    outcome = fabric("evaluate", *given, *change, "--json", report)
    assert outcome.code == 0, outcome.err
    record = json.loads(report.read_text())
    assert record["against"]["weights"] == "ternary1.6"
    assert record["divergence"]["kl_max"] == 0
    assert record["divergence"]["top1_agreement"] == 1
    assert f"{record['divergence']['positions']:,}" in outcome.out
    for word, message in (
        ("weights", "name=value"),
        ("weights=ternary3", "Did you mean 'ternary2'"),
        ("wieghts=int8", "Did you mean 'weights'"),
        (f"model={tmp_path / 'short'}", "at most 32"),
    ):
        assert message in refused("evaluate", *given, "--against", word)
