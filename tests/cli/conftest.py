"""A small file of rows and a short run, shared by the commands' tests."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest

from fabric_jax.cli.main import main

SMALL = ("--max-length", "48", "--batch-size", "4")


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


def call(words: Iterable[object]) -> int:
    """``main`` under JAX's own settings: optax's schedules promote integers to floats."""
    with jax.numpy_dtype_promotion("standard"):
        return main([str(word) for word in words])


@pytest.fixture
def fabric(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs ``fabric-jax`` in this process."""

    def run(*words: str | Path) -> Outcome:
        capfd.readouterr()
        code = call(words)
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def refused(fabric: Run) -> Callable[..., str]:
    """Runs ``fabric-jax`` with wrong input and returns its one message."""

    def run(*words: str | Path) -> str:
        outcome = fabric(*words)
        assert outcome.code == 2, outcome
        assert "Traceback" not in outcome.err
        assert outcome.err.count("fabric-jax: error: ") == 1, outcome.err
        return outcome.err.partition("fabric-jax: error: ")[2]

    return run


def write_rows(path: Path, numbers: range) -> Path:
    rows = [
        {
            "text": f"Q: Is {n} even?\nA: {'Yes' if n % 2 == 0 else 'No'}.",
            "label": "Yes" if n % 2 == 0 else "No",
        }
        for n in numbers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "train.jsonl", range(24))


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "validation.jsonl", range(100, 110))


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory, rows: Path, held_out: Path) -> Path:
    """The output folder of a fine-tuning run of a few steps."""
    output = tmp_path_factory.mktemp("tuned") / "run"
    words = ["finetune", "--model", "bitnet-tiny", "--data", str(rows), "--output", str(output)]
    words += ["--eval-data", str(held_out), "--rank", "2", "--targets", "q", "v", "--epochs", "2"]
    words += ["--max-steps", "5", "--learning-rate", "0.003", *SMALL]
    assert call(words) == 0
    return output
