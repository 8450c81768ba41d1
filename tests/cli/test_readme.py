import ast
import re
import shlex
from pathlib import Path

import jax
import pytest

import fabric_jax
from fabric_jax.cli.arguments import parse
from fabric_jax.cli.evaluate import EvaluateConfig
from fabric_jax.cli.main import COMMANDS
from fabric_jax.conversion.config import ConvertConfig
from fabric_jax.training.config import FinetuneConfig, PretrainConfig
from fabric_jax.training.memory_account import MemoryConfig

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
COMMAND_LINES = [line for line in README.splitlines() if line.startswith("fabric-jax ")]
CONFIGS = {
    "finetune": FinetuneConfig,
    "evaluate": EvaluateConfig,
    "convert": ConvertConfig,
    "memory": MemoryConfig,
    "pretrain": PretrainConfig,
}


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_commands_parse(line: str):
    _, command, *words = shlex.split(line, comments=True)
    assert command in COMMANDS
    if words:
        config = parse(CONFIGS[command], command, words)
        assert config.model or config.fits


def test_python_runs_on_a_file_of_rows(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_bytes(rows.read_bytes())

    with jax.numpy_dtype_promotion("standard"):
        exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert capsys.readouterr().out.endswith("\n")


def test_named_files_exist_and_define_what_is_said_of_them():
    named = set(re.findall(r"`((?:fabric_jax|kernels|tests|docs)/[\w./]*)`", README))
    assert len(named) >= 6
    for name in named:
        assert (ROOT / name).exists(), name
    steps = re.findall(r"^\d\. `(\S+)`: (.*?)(?=^\d\. |\n\n)", README, re.DOTALL | re.MULTILINE)
    assert len(steps) == 6
    for path, text in steps:
        tree = ast.parse((ROOT / path).read_text())
        defined = {
            node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef)
        }
        assert defined & set(re.findall(r"\w+", text)), path


def test_public_names_of_the_example_are_exported():
    (names,) = re.findall(r"from fabric_jax import (.*)", README)
    assert set(names.split(", ")) <= set(fabric_jax.__all__)
