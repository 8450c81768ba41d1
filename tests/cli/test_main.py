import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from fabric_jax.cli import main as cli
from fabric_jax.errors import FabricError
from fabric_jax.training.interrupt import Interrupted

PROGRAM = Path(sys.executable).with_name("fabric-jax")


def command_that(monkeypatch: pytest.MonkeyPatch, act: Callable[[], int]) -> None:
    """Makes ``fabric-jax models`` do something else."""
    module = SimpleNamespace(run=lambda arguments: act())
    monkeypatch.setattr(cli, "import_module", lambda name: module)


def raising(error: BaseException) -> Callable[[], int]:
    def act() -> int:
        raise error

    return act


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_help_names_every_command(fabric, word: str):
    outcome = fabric(word)
    assert outcome.code == 0
    for name, text in cli.COMMANDS.items():
        assert f"  {name} " in outcome.out
        assert text in outcome.out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_exists_and_has_help(fabric, name: str):
    outcome = fabric(name, "--help")
    assert outcome.code == 0
    assert f"fabric-jax {name}" in outcome.out


def test_no_command_is_an_error_with_the_help(fabric):
    outcome = fabric()
    assert outcome.code == 2
    assert "quickstart" in outcome.err


def test_version(fabric):
    outcome = fabric("--version")
    assert outcome.code == 0
    assert outcome.out.startswith(f"fabric-jax {version('fabric-jax')} (jax {version('jax')}")


@pytest.mark.parametrize(
    ("word", "meant"), [("fintune", "finetune"), ("docter", "doctor"), ("--versoin", "--version")]
)
def test_closest_command_is_offered(refused, word: str, meant: str):
    assert refused(word).endswith(f"Did you mean {meant!r}?\n")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_unknown_flags_are_refused(fabric, name: str):
    outcome = fabric(name, "--no-such-flag")
    assert outcome.code == 2
    assert "--no-such-flag" in outcome.err


def test_closest_flag_is_offered(fabric):
    given = ("--model", "bitnet-tiny", "--data", "rows.jsonl", "--output", "run")
    outcome = fabric("finetune", *given, "--leaning-rate", "1")
    assert outcome.code == 2
    assert "--learning-rate" in outcome.err


def test_errors_come_without_a_traceback_unless_asked_for(fabric, monkeypatch: pytest.MonkeyPatch):
    command_that(monkeypatch, raising(FabricError("wrong", expected="right")))
    outcome = fabric("models")
    assert (outcome.code, outcome.err) == (2, "fabric-jax: error: wrong; expected right.\n")
    monkeypatch.setenv("FABRIC_TRACEBACK", "1")
    outcome = fabric("models")
    assert outcome.code == 2
    assert outcome.err.startswith("Traceback")
    assert outcome.err.endswith("fabric-jax: error: wrong; expected right.\n")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "fabric-jax: interrupted\n"),
        (Interrupted("saved, resume so", signal.SIGTERM), 143, "fabric-jax: saved, resume so\n"),
        (Interrupted("saved, resume so", signal.SIGINT), 130, "fabric-jax: saved, resume so\n"),
        (SystemExit(7), 7, ""),
        (SystemExit(), 0, ""),
        (SystemExit("no"), 1, "no\n"),
    ],
    ids=["ctrl-c", "sigterm-after-saving", "ctrl-c-after-saving", "exit-7", "exit", "exit-text"],
)
def test_exit_codes(
    fabric, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
):
    command_that(monkeypatch, raising(error))
    outcome = fabric("models")
    assert (outcome.code, outcome.err) == (code, message)


def test_a_defect_is_not_disguised_as_wrong_input(monkeypatch: pytest.MonkeyPatch):
    command_that(monkeypatch, raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["models"])


def test_help_imports_neither_jax_nor_tyro():
    program = (
        "import sys; from fabric_jax.cli.main import main; main(['--help']);"
        "sys.exit(sum(name in sys.modules for name in ('jax', 'numpy', 'tyro', 'rich')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0, done


@pytest.mark.parametrize(
    "command",
    [[str(PROGRAM)], [sys.executable, "-m", "fabric_jax.cli.main"]],
    ids=["program", "module"],
)
def test_exit_code_reaches_the_shell(command: list[str]):
    if not Path(command[0]).exists():
        pytest.skip("fabric-jax is not installed beside this Python")
    done = subprocess.run([*command, "modles"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.endswith("Did you mean 'models'?\n")


def test_a_platform_that_is_not_there_is_named():
    command = [sys.executable, "-m", "fabric_jax.cli.main", "doctor"]
    environment = {**os.environ, "JAX_PLATFORMS": "nonsense"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "fabric-jax: error: jax finds no device of JAX_PLATFORMS=nonsense"
    )


@pytest.mark.parametrize("words", ["models", "models --json"])
def test_a_reader_that_leaves_early_is_no_error(words: str):
    program = f"{sys.executable} -m fabric_jax.cli.main {words} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == cli.BROKEN_PIPE_CODE
