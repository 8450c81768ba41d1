"""Output folders that can't be written: one message, and nothing half-written."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fabric_jax.cli.main import main
from fabric_jax.training.command import flags
from fabric_jax.training.loop import finetune
from tests.training.conftest import Configure
from tests.training.runs import adapter_bytes

pytestmark = pytest.mark.xdist_group("training processes")

ROOT = Path(__file__).resolve().parents[2]
POWERLESS = """
import contextlib, ctypes, io, json, os, sys
from fabric_jax.cli.main import main

CAP_DAC_OVERRIDE, VERSION = 1, 0x20080522
if os.geteuid() == 0:
    # Root may write anywhere by this capability, which the process gives up.
    header = (ctypes.c_uint32 * 2)(VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, sets) == 0
    sets[0] &= ~(1 << CAP_DAC_OVERRIDE)
    assert libc.capset(header, sets) == 0

def run(words):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main(words)
    return code, said.getvalue()

print(json.dumps([run(words) for words in json.loads(sys.argv[1])]))
"""


def powerless(commands: list[list[str]]) -> list[tuple[int, str]]:
    """Exit code and text of commands of a process that file permissions hold for."""
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "JAX_PLATFORMS": "cpu",
    }
    result = subprocess.run(
        [sys.executable, "-c", POWERLESS, json.dumps(commands)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return [(code, text) for code, text in json.loads(result.stdout)]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder, None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_a_read_only_folder_is_named_and_stays_as_it_is(
    configure: Configure, micro_model: Path, text_rows: Path, tmp_path: Path
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    (closed / "there").write_text("before")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n")
    # A run whose folder was closed after it ended: it can be neither resumed nor exported again.
    run = tmp_path / "run"
    finished: dict[str, Any] = {"max_steps": 2, "tensorboard": False}
    finetune(configure(run, **finished), console=Console(quiet=True))
    before = contents(run)
    folders = [run, *(path for path in run.rglob("*") if path.is_dir()), closed]
    for folder in folders:
        folder.chmod(0o555)
    (run / ".lock").chmod(0o444)
    model = str(micro_model)
    try:
        found = powerless(
            [
                ["finetune", *flags(configure(closed / "new"))],
                ["finetune", *flags(configure(closed))],
                ["finetune", *flags(configure(run, resume="auto", **finished))],
                ["convert", model, str(closed / "model"), "--to", "native"],
                ["convert", model, str(closed / "model.gguf"), "--to", "gguf-f16"],
                ["generate", model, "--prompts", str(prompts), "--out", str(closed / "a.jsonl")],
                [
                    *("evaluate", "--model", model, "--data", str(text_rows)),
                    *("--json", str(closed / "e.json")),
                ],
                ["sweep", "experiments.vram", "--platform", "cpu", "--out", str(closed)],
            ]
        )
    finally:
        for folder in folders:
            folder.chmod(0o755)
    for code, text in found:
        assert code == 2, text
        assert "cannot write" in text, text
        assert "Permission denied" in text, text
        assert text.count("fabric-jax: error:") == 1, text
        assert "Traceback" not in text, text
    assert contents(closed) == {"there": b"before"}
    assert contents(run) == before
    assert adapter_bytes(run)


@pytest.mark.parametrize(
    "words",
    [
        ["finetune", "--model", "bitnet-tiny", "--data", "ROWS", "--output", "FILE/run"],
        ["convert", "MODEL", "FILE/model", "--to", "native"],
        ["convert", "MODEL", "FILE/model.gguf", "--to", "gguf-f16"],
        ["generate", "MODEL", "--prompts", "ROWS", "--out", "FILE/a.jsonl"],
        ["evaluate", "--model", "MODEL", "--data", "ROWS", "--json", "FILE/e.json"],
        ["sweep", "experiments.vram", "--platform", "cpu", "--out", "FILE/records"],
    ],
    ids=lambda words: " ".join(words[:1]),
)
def test_a_path_below_a_file_is_named(
    words: list[str],
    micro_model: Path,
    text_rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "file"
    file.write_text("before")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n")
    rows = prompts if words[0] == "generate" else text_rows
    places = {"MODEL": str(micro_model), "ROWS": str(rows), "FILE": str(file)}
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "cannot write" in error
    assert "Not a directory" in error or "File exists" in error
    assert "Traceback" not in error
    assert contents(tmp_path) == {"file": b"before", "prompts.txt": b"one\n"}
