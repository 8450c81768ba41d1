import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from fabric_jax.checkpoints.native import save_model
from fabric_jax.cli.arguments import parse
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.initialize import initialize_base
from fabric_jax.models.registry import REGISTRY
from fabric_jax.training.config import FinetuneConfig

SMALL = ("--max-length", "48", "--batch-size", "4", "--rank", "2")


def flag_names(config: Any) -> list[str]:
    names: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            names += flag_names(value)
        else:
            names.append("--" + field.name.replace("_", "-"))
    return names


def test_help_explains_every_flag(fabric):
    given = parse(FinetuneConfig, "finetune", ["--model", "m", "--data", "d", "--output", "o"])
    text = re.sub(r"[│\s]+", " ", fabric("finetune", "--help").out)
    for flag in flag_names(given):
        found = re.search(
            rf" {flag}(?:, --no\S+)?(?: [A-Z]+| \{{\S+\}}| \[.*?\]\])? (\S.*?)\(", text
        )
        assert found is not None, flag
        assert len(found[1].split()) > 1, flag


def test_every_setting_is_a_flat_flag():
    words = "--model m --data d --output o --rank 3 --targets q mlp --adapter-dtype bfloat16"
    words += " --dtype bfloat16 --no-packing --rslora --warmup-steps 7 --data-seed 5 --seed 6"
    config = parse(FinetuneConfig, "finetune", words.split())
    assert (config.lora.rank, config.lora.targets, config.lora.rslora) == (3, ("q", "mlp"), True)
    assert (config.lora.adapter_dtype, config.dtype) == ("bfloat16", "bfloat16")
    assert (config.dataset.packing, config.dataset.data_seed, config.seed) == (False, 5, 6)
    assert config.optimizer.warmup_steps == 7


def test_a_run_leaves_an_adapter_metrics_and_a_summary(tuned: Path):
    summary = json.loads((tuned / "summary.json").read_text())
    assert summary["steps"] == 5
    assert summary["loss_last"] < summary["loss_first"]
    lines = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "step" in line][-1] == 5
    tensors = load_file(tuned / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == REGISTRY["bitnet-tiny"].num_layers * 2 * 2
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


def test_the_result_is_printed(fabric, rows: Path, tmp_path: Path):
    output = tmp_path / "run"
    given = ("--data", rows, "--output", output, "--max-steps", "2", *SMALL)
    outcome = fabric("finetune", "--model", "bitnet-tiny", *given)
    assert outcome.code == 0, outcome.err
    assert re.search(r"steps +2 ", outcome.out)
    assert str(output / "adapter") in outcome.out
    assert "trainable tokens" in outcome.err


def bad_line(folder: Path) -> tuple[list[str], list[str]]:
    path = folder / "bad.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "not closed\n')
    return ["--data", str(path)], [f"{path}, line 2 is not JSON", "column"]


def not_text(folder: Path) -> tuple[list[str], list[str]]:
    path = folder / "binary.jsonl"
    path.write_bytes(b'{"text": "\xff\xfe"}\n')
    return ["--data", str(path)], [f"{path}, line 1", "UTF-8"]


def unknown_key(folder: Path) -> tuple[list[str], list[str]]:
    path = folder / "keys.jsonl"
    path.write_text('{"txt": "a"}\n')
    return ["--data", str(path)], [f"{path}, line 1", "Did you mean 'text' for 'txt'?"]


def empty(folder: Path) -> tuple[list[str], list[str]]:
    path = folder / "empty.jsonl"
    path.write_text("")
    return ["--data", str(path)], [str(path), "no rows"]


def nothing_to_train_on(folder: Path) -> tuple[list[str], list[str]]:
    path = folder / "blank.jsonl"
    path.write_text('{"text": ""}\n')
    return ["--data", str(path)], [f"no trainable token in {path}"]


def other_model(folder: Path) -> Path:
    """A saved model with half the layers of bitnet-tiny."""
    config = dataclasses.replace(REGISTRY["bitnet-tiny"], name="shallow", num_layers=2)
    definition = define_decoder(config, DecoderOptions())
    save_model(folder / "shallow", definition, initialize_base(definition, 0), tokenizer_json=None)
    return folder / "shallow"


def damaged_tokenizer(folder: Path) -> tuple[list[str], list[str]]:
    path = folder / "tokenizer.json"
    path.write_text("{")
    return ["--tokenizer", str(path)], [str(path)]


def no_gguf(folder: Path) -> tuple[list[str], list[str]]:
    path = folder / "vocabulary.gguf"
    path.write_bytes(b"not gguf at all")
    return ["--tokenizer", str(path)], [str(path)]


Case = Callable[[Path], tuple[list[str], list[str]]]
WRONG: dict[str, Case] = {
    "missing-data": lambda folder: (["--data", f"{folder}/none.jsonl"], [f"{folder}/none.jsonl"]),
    "malformed-line": bad_line,
    "not-utf8": not_text,
    "unknown-key": unknown_key,
    "empty-file": empty,
    "no-trainable-token": nothing_to_train_on,
    "missing-eval-data": lambda folder: (["--eval-data", f"{folder}/no.jsonl"], ["no.jsonl"]),
    "unknown-model": lambda _: (["--model", "bitnet-tinny"], ["Did you mean 'bitnet-tiny'?"]),
    "unknown-target": lambda _: (["--targets", "gates"], ["'gates'", "Did you mean 'gate'?"]),
    "unknown-column": lambda _: (["--columns", "text=txet"], ["Did you mean 'text'?"]),
    "unknown-column-name": lambda _: (["--columns", "texd=text"], ["Did you mean 'text'?"]),
    "rank-too-large": lambda _: (["--rank", "193"], ["rank 193", "at most 192"]),
    "rank-zero": lambda _: (["--rank", "0"], ["rank 0"]),
    "rows-too-long": lambda _: (["--max-length", "513"], ["at most 512", "513"]),
    "learning-rate": lambda _: (["--learning-rate", "-1"], ["learning_rate", "0 or more"]),
    "missing-tokenizer": lambda f: (["--tokenizer", f"{f}/none.json"], [f"{f}/none.json"]),
    "damaged-tokenizer": damaged_tokenizer,
    "damaged-gguf": no_gguf,
    "missing-adapter": lambda f: (["--adapter", f"{f}/none"], [f"{f}/none", "does not exist"]),
    "no-adapter-folder": lambda f: (["--adapter", str(f)], ["adapter_config.json"]),
    "unwritable-output": lambda _: (["--output", "/proc/none/run"], ["/proc/none"]),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_message(refused, rows: Path, tmp_path: Path, case: Case):
    words, parts = case(tmp_path)
    given: dict[str, list[str]] = {
        "--model": ["bitnet-tiny"],
        "--data": [str(rows)],
        "--output": [str(tmp_path / "run")],
        "--max-length": ["48"],
        "--max-steps": ["1"],
    }
    flags = [word for word in words if word.startswith("--")]
    kept = [word for flag, value in given.items() if flag not in flags for word in (flag, *value)]
    message = refused("finetune", *kept, *words)
    for part in parts:
        assert part in message


def test_an_adapter_of_another_model_is_refused(refused, tuned: Path, rows: Path, tmp_path: Path):
    model = other_model(tmp_path)
    given = ("--adapter", tuned / "adapter", "--data", rows, "--output", tmp_path / "run")
    message = refused("finetune", "--model", model, *given, "--max-length", "48")
    assert "does not fit shallow" in message
    assert "bitnet-tiny" in message


def test_a_folder_with_a_run_is_not_overwritten(refused, tuned: Path, rows: Path):
    given = ("--data", rows, "--output", tuned, "--max-length", "48")
    assert "--resume auto" in refused("finetune", "--model", "bitnet-tiny", *given)


def test_a_checkpoint_of_other_settings_is_refused(refused, tuned: Path, rows: Path):
    given = ("--data", rows, "--output", tuned, "--rank", "3", "--resume", "auto")
    message = refused("finetune", "--model", "bitnet-tiny", *given, "--max-length", "48")
    assert "rank" in message


def test_sigterm_saves_and_the_printed_command_goes_on(rows: Path, tmp_path: Path):
    output = tmp_path / "run"
    program = [sys.executable, "-m", "fabric_jax.cli.main"]
    given = ["finetune", "--model", "bitnet-tiny", "--data", str(rows), "--output", str(output)]
    given += ["--epochs", "100", *SMALL]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = subprocess.Popen([*program, *given], stderr=subprocess.PIPE, text=True, env=environment)
    metrics = output / "metrics.jsonl"
    while run.poll() is None and not (metrics.exists() and '"step": 2,' in metrics.read_text()):
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 143, said
    command = said.strip().splitlines()[-1].split()
    assert command[:2] == ["fabric-jax", "finetune"]
    done = int(re.findall(r"after step (\d+) of \d+, saved", said)[-1])
    again = [*program, *command[1:]]
    second = subprocess.Popen(again, stderr=subprocess.PIPE, text=True, env=environment)
    while second.poll() is None and f'"step": {done + 1},' not in metrics.read_text():
        time.sleep(0.05)
    second.send_signal(signal.SIGINT)
    _, said = second.communicate(timeout=120)
    assert second.returncode == 130, said
    assert f"resuming after step {done} of" in said
    steps = [json.loads(line).get("step") for line in metrics.read_text().splitlines()]
    steps = [step for step in steps if step]
    assert steps == list(range(1, len(steps) + 1))
