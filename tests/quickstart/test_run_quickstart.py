"""The quickstart in miniature, and once at full length."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from fabric_jax.cli import quickstart as command
from fabric_jax.cli.arguments import parse
from fabric_jax.cli.main import main
from fabric_jax.errors import FabricError
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.registry import get_config
from fabric_jax.quickstart.report import Report
from fabric_jax.quickstart.run import run_quickstart
from fabric_jax.quickstart.settings import QuickstartConfig, Recipe
from fabric_jax.training.config import FinetuneConfig

# One worker, so that the miniature is trained once.
pytestmark = pytest.mark.xdist_group("quickstart")

MINIATURE = Recipe(
    drugs=6,
    held_out=1,
    pretrain_epochs=1,
    pretrain_rows=4,
    finetune_epochs=2,
    finetune_rows=1,
    lora=LoraConfig(rank=2, targets=("q", "down")),
    log_every=1,
    eval_every=2,
)


@dataclass(frozen=True)
class Miniature:
    report: Report
    summary: dict[str, Any]
    root: Path


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Miniature]:
    root = tmp_path_factory.mktemp("quickstart") / "run"
    report = run_quickstart(QuickstartConfig(output=str(root), seed=5), recipe=MINIATURE)
    yield Miniature(report, json.loads((root / "summary.json").read_text()), root)
    jax.clear_caches()


def test_every_artefact_is_there(miniature: Miniature):
    for name in (
        *("data/statements.jsonl", "data/questions.jsonl", "data/held_out.jsonl"),
        *("model/config.json", "model/model.safetensors", "model/tokenizer.json"),
        *("finetune/adapter/adapter_model.safetensors", "finetune/adapter/adapter_config.json"),
        *("pretrain/metrics.jsonl", "finetune/metrics.jsonl", "summary.json", "quickstart.json"),
    ):
        assert (miniature.root / name).stat().st_size > 0, name
    assert (miniature.root / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    for run in ("pretrain", "finetune"):
        assert list((miniature.root / run / "tensorboard").glob("events.out.*"))


def test_summary_has_the_promised_keys(miniature: Miniature):
    summary = miniature.summary
    for key in (
        *("accuracy_before", "accuracy_after", "seconds", "bytes_packed", "bytes_f16"),
        *("loss_first", "loss_last", "tokens_per_second", "seconds_per_step", "peak_bytes"),
        "trainable_tokens",
    ):
        assert np.isfinite(summary[key]), key
    assert summary["held_out_questions"] == 6
    for key in ("accuracy_before", "accuracy_after", "generation_accuracy_after"):
        assert 0 <= summary[f"{key}_low"] <= summary[key] <= summary[f"{key}_high"] <= 1
        assert summary[key] * 6 == pytest.approx(round(summary[key] * 6))


def test_bytes_are_those_of_the_files(miniature: Miniature):
    summary = miniature.summary
    model = load_file(miniature.root / "model" / "model.safetensors")
    assert summary["bytes_packed"] == sum(array.nbytes for array in model.values())
    packed = sum(array.nbytes for array in model.values() if array.dtype == np.uint8)
    config = get_config("bitnet-tiny")
    assert packed == config.linear_parameters // 4
    assert summary["bytes_packed_weights"] == packed
    embedding = summary["vocab_size"] * config.hidden_size
    assert summary["bytes_f16"] == 2 * (
        config.linear_parameters + config.norm_parameters + embedding
    )
    adapter = load_file(miniature.root / "finetune" / "adapter" / "adapter_model.safetensors")
    assert summary["bytes_packed_adapters"] == sum(array.nbytes for array in adapter.values())


def test_packed_codes_are_those_of_the_master_weights(miniature: Miniature):
    master = load_file(miniature.root / "pretrain" / "model" / "model.safetensors")
    packed = load_file(miniature.root / "model" / "model.safetensors")
    for layer, weight in enumerate(master["layers.mlp.down.weight"]):
        mean = np.float32(np.abs(weight.astype(np.float64)).mean())
        scaled = weight * (np.float32(1) / mean)
        codes = np.clip(np.rint(scaled), -1, 1).astype(np.int64)
        bytes_ = packed["layers.mlp.down.weight"][layer]
        found = np.stack([(bytes_ >> shift) & 3 for shift in (0, 2, 4, 6)], -1) - np.int64(1)
        # The sum of |W| may round differently here, which moves what lies on an edge.
        edges = np.abs(np.abs(scaled) - 0.5) < 1e-4
        np.testing.assert_array_equal(found.reshape(codes.shape)[~edges], codes[~edges])


def test_answers_are_generated_for_each_class(miniature: Miniature):
    answers = miniature.report.answers
    assert [answer.expected for answer in answers] == ["Yes", "No", "Uncertain"]
    held_out = (miniature.root / "data" / "held_out.jsonl").read_text().splitlines()
    rows = {row["question"]: row["label"] for row in map(json.loads, held_out)}
    assert all(rows[answer.question] == answer.expected for answer in answers)


def test_the_table_shows_what_was_measured(
    miniature: Miniature, capsys: pytest.CaptureFixture[str]
):
    command.show(miniature.report)
    printed = capsys.readouterr().out
    for value in (
        f"{miniature.summary['accuracy_after']:.1%}",
        f"{miniature.summary['eval_loss_last']:.4f}",
        f"{miniature.summary['bytes_packed']:,}",
        f"{miniature.summary['bytes_f16']:,}",
        f"{miniature.summary['tokens_per_second']:,.0f}",
    ):
        assert value in printed


def test_the_commands_it_suggests_work(miniature: Miniature, capsys: pytest.CaptureFixture[str]):
    evaluate, finetune, tensorboard = map(shlex.split, command.next_commands(miniature.report))
    assert evaluate[0] == finetune[0] == "fabric-jax"
    assert main(evaluate[1:]) == 0
    accuracy = miniature.summary["generation_accuracy_after"]
    line = next(x for x in capsys.readouterr().out.splitlines() if "accuracy by generation" in x)
    assert line.split()[-1] == f"{accuracy:.1%}"
    config = parse(FinetuneConfig, "finetune", finetune[2:])
    assert Path(config.model).is_dir()
    assert Path(config.dataset.data).is_file()
    assert Path(tensorboard[-1]) == miniature.root


def test_a_second_run_replaces_the_first_with_the_same_numbers(miniature: Miniature):
    path = miniature.root / "finetune" / "adapter" / "adapter_model.safetensors"
    first = path.read_bytes()
    again = run_quickstart(
        QuickstartConfig(output=str(miniature.root), seed=5), recipe=MINIATURE
    ).to_json()
    assert path.read_bytes() == first
    for key in ("accuracy_before", "accuracy_after", "loss_first", "loss_last", "bytes_packed"):
        assert again[key] == miniature.summary[key]


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path):
    kept = tmp_path / "thesis.txt"
    kept.write_text("years of work")
    with pytest.raises(FabricError, match=r"no quickstart; found thesis\.txt.*--output"):
        run_quickstart(QuickstartConfig(output=str(tmp_path)), recipe=MINIATURE)
    assert kept.read_text() == "years of work"


def test_the_command_line_reports_a_folder_it_can_not_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["quickstart", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error
    assert "Traceback" not in error


def test_help_names_the_flags(capsys: pytest.CaptureFixture[str]):
    assert main(["quickstart", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "--output" in printed
    assert "--seed" in printed


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_fine_tuning_teaches_the_answers(tmp_path: Path, seed: int):
    summary = run_quickstart(QuickstartConfig(output=str(tmp_path / "run"), seed=seed)).to_json()
    assert summary["held_out_questions"] >= 100
    # It has read the facts, but no answer: one of three by chance, or a few more by what it knows.
    assert summary["accuracy_before"] <= 0.60
    assert summary["generation_accuracy_before"] <= 0.45
    for by in ("accuracy", "generation_accuracy"):
        assert summary[f"{by}_after"] >= 0.90
    assert summary["bytes_packed"] < summary["bytes_f16"] / 3
