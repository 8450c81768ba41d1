import json
from pathlib import Path


def test_a_table_with_all_columns_and_its_figures(fabric, tmp_path: Path):
    figures = tmp_path / "memory.json"
    words = ["--model", "bitnet-tiny", "--max-length", "32", "--rank", "2", "--steps", "1"]
    outcome = fabric("memory", *words, "--json", figures)
    assert outcome.code == 0, outcome.err
    for text in ("analytic", "compiled", "device", "gradients", "compiled less analytic"):
        assert text in outcome.out
    record = json.loads(figures.read_text())
    assert record["measured"]["steps"] == 1
    assert record["compiled"]["arguments"] > record["arrays"]["weights"] > 0


def test_which_size_fits(fabric, tmp_path: Path):
    figures = tmp_path / "fits.json"
    words = ["--fits", "1", "--embedding-dtype", "float16", "--remat", "layer"]
    outcome = fabric("memory", *words, "--json", figures)
    assert outcome.code == 0, outcome.err
    assert "bitnet-1b" in outcome.out
    assert "bitnet-13b" not in outcome.out
    assert json.loads(figures.read_text())["analytic"]["bitnet-1b"] < 2**30


def test_nothing_fits(fabric):
    outcome = fabric("memory", "--fits", "0.01")
    assert outcome.code == 1
    assert "no published size" in outcome.out


def test_figures_that_cannot_be_written_are_refused_first(refused, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("fabric_jax.training.memory_account.account", None)
    assert "is no file" in refused("memory", "--model", "bitnet-tiny", "--json", tmp_path)


def test_neither_model_nor_limit_is_one_message(refused):
    assert "--fits" in refused("memory")
