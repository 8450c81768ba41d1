"""The sweep over straight-through variants: one corpus for all cells, one switch a variant."""

import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.ablations import ste_variants
from experiments.stdlib_corpus import FOLDER_VARIABLE, shared_corpus
from fabric_jax.data import load_corpus

SMALL = ste_variants.Config(num_layers=1, tokens=256, rows=2, length=32, vocab=300)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small standard library, and a folder of corpora of its own."""
    root = tmp_path / "library"
    root.mkdir()
    for number in range(100):
        lines = [f"def f_{number}_{line}(x):\n    return x + {line}\n" for line in range(5)]
        (root / f"m{number}.py").write_text("".join(lines))
    original = sysconfig.get_path
    monkeypatch.setattr(
        sysconfig, "get_path", lambda name: str(root) if name == "stdlib" else original(name)
    )
    monkeypatch.setattr("fabric_jax.data.stdlib._topics", dict)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "corpora"))
    return root


def test_all_who_ask_at_once_get_one_corpus(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learnt: list[int] = []
    train_bpe: Any = load_corpus.train_bpe

    def counted(texts: Any, *, largest: int) -> bytes:
        learnt.append(largest)
        return train_bpe(texts, largest=largest)

    monkeypatch.setattr(load_corpus, "train_bpe", counted)
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(shared_corpus, vocab=300, held_out=0.1) for _ in range(8)]
    found = [future.result() for future in futures]
    assert len({corpus.digest for corpus in found}) == 1
    assert learnt == [300]
    # Another library is another corpus.
    (library / "another.py").write_text("x = 1\n")
    assert shared_corpus(vocab=300, held_out=0.1).digest != found[0].digest


def test_variants_differ_in_one_switch_and_train_on_the_same_rows(library: Path) -> None:
    jobs = {
        name: ste_variants.job_config(replace(SMALL, variant=name), "corpus", "run")
        for name in ste_variants.VARIANTS
    }
    base = jobs["b1.58"]
    for name, job in jobs.items():
        ste = vars(job.ste).items() - vars(base.ste).items()
        shape = [key for key in ("gate", "sub_norms") if getattr(job, key) != getattr(base, key)]
        assert len(ste) + len(shape) == (0 if name == "b1.58" else 1)
        assert job.dataset == base.dataset
    plain = ste_variants.measure(SMALL)
    other = ste_variants.measure(replace(SMALL, variant="scale-by-channel"))
    assert plain["corpus"] == other["corpus"]
    assert (plain["packs"], other["packs"]) == (True, False)
    assert 0 < plain["bits_per_byte"] != other["bits_per_byte"] > 0
    assert plain["steps"] == 4


def test_ten_cells_fit_a_device() -> None:
    chosen = ste_variants.environment(ste_variants.config(), "cuda")
    assert 10 * (float(chosen["XLA_PYTHON_CLIENT_MEM_FRACTION"]) + 0.015) <= 0.95
    assert ste_variants.environment(ste_variants.config(), "cpu") == {}
