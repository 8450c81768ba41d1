import ast
import re
import shlex
from pathlib import Path

import jax
import pytest

import fabric_jax
from fabric_jax.cli.arguments import parse
from fabric_jax.cli.evaluate import EvaluateConfig
from fabric_jax.cli.generate import GenerateConfig
from fabric_jax.cli.main import COMMANDS, main
from fabric_jax.conversion.config import ConvertConfig
from fabric_jax.training.config import FinetuneConfig, PretrainConfig
from fabric_jax.training.memory_account import MemoryConfig

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
COMMAND_LINES = [line for line in README.splitlines() if line.startswith("fabric-jax ")]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
CONFIGS = {
    "finetune": FinetuneConfig,
    "evaluate": EvaluateConfig,
    "convert": ConvertConfig,
    "generate": GenerateConfig,
    "memory": MemoryConfig,
    "pretrain": PretrainConfig,
}


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_commands_parse(line: str):
    _, command, *words = shlex.split(line, comments=True)
    assert command in COMMANDS
    if command == "sweep":
        assert main(["sweep", *words, "--list"]) == 0
    elif words and command in CONFIGS:
        config = parse(CONFIGS[command], command, words)
        assert config.model or config.fits


def test_python_runs_on_a_file_of_rows(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (code,) = (text for text in PYTHON if "load_model" in text)
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


def test_the_experiment_gets_records_table_and_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (code,) = (text for text in PYTHON if "def cells" in text)
    (tmp_path / "recompute.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["sweep", "recompute", "--platform", "cpu", "--out", "records"]
    assert main([*words, "model=bitnet-tiny", "length=128", "remat=layer"]) == 0
    assert main(["report", "records"]) == 0
    text = (tmp_path / "records" / "report.md").read_text()
    assert "Where does recomputing layers begin to pay?" in text
    assert re.search(
        r"^\| \[bitnet-tiny\]\(\S+\) \| compiled \| [\d.]+ MiB \|$", text, re.MULTILINE
    )
    assert (tmp_path / "records" / "figures" / "recompute.svg").is_file()
