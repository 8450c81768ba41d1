"""The small parts of a run: the command line of a configuration, metrics files, counters."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric_jax.cli.arguments import parse
from fabric_jax.data.config import DataConfig
from fabric_jax.errors import FabricError
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.training.command import command_line, flags
from fabric_jax.training.config import FinetuneConfig, OptimizerConfig
from fabric_jax.training.metrics import MetricsLog, cut_back, perplexity
from fabric_jax.training.totals import Totals

WORDS = st.text("abc/ -_'é", min_size=1, max_size=8).filter(lambda word: word[0] not in "-")


@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_flags_give_the_configuration_back(data: st.DataObject) -> None:
    draw = data.draw
    config = FinetuneConfig(
        model=draw(WORDS),
        output=draw(WORDS),
        adapter=draw(st.sampled_from(["", "some folder"])),
        dataset=DataConfig(
            data=draw(WORDS),
            packing=draw(st.booleans()),
            shuffle=draw(st.booleans()),
            columns=draw(st.sampled_from([(), ("text=body",), ("prompt=a", "completion=b")])),
            eval_fraction=draw(st.floats(0, 0.5)),
        ),
        lora=LoraConfig(
            rank=draw(st.integers(1, 8)),
            targets=draw(st.sampled_from([("all",), ("up", "v"), ("mlp", "v")])),
            ranks=draw(st.sampled_from([(), (("up", 16),), (("v", 9), ("up", 10))])),
            alphas=draw(st.sampled_from([(), (("v", 2.5), ("up", 3.0))])),
            rslora=draw(st.booleans()),
        ),
        optimizer=OptimizerConfig(learning_rate=draw(st.floats(1e-9, 1.0))),
        tensorboard=draw(st.booleans()),
        act_quant=draw(st.sampled_from([None, "none", "block256"])),
        resume=draw(st.sampled_from(["auto", "never"])),
    )
    assert parse(FinetuneConfig, "finetune", flags(config)) == config


def test_the_command_line_is_quoted_for_a_shell() -> None:
    config = FinetuneConfig(model="m", output="my runs", dataset=DataConfig(data="d"))
    assert command_line("finetune", config).startswith("fabric-jax finetune --output 'my runs'")


@given(steps=st.integers(0, 6), last=st.integers(0, 7), torn=st.integers(0, 20))
def test_metrics_are_cut_back_to_whole_lines(
    tmp_path_factory: pytest.TempPathFactory, steps: int, last: int, torn: int
) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.5}) + "\n" for step in range(1, steps + 1)]
    path.write_text("".join(lines) + lines[-1][: min(torn, 18)] if lines else "")
    cut_back(path, last)
    assert path.read_text() == "".join(lines[:last])


@pytest.mark.parametrize(
    "junk", [b"\xff\xfe\n", b"[1]\n", b'{"loss": 1}\n', b"\0" * 40 + b"\n"], ids=repr
)
def test_metrics_after_an_unreadable_line_are_removed(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + junk + b'{"step": 2}\n')
    cut_back(path, 5)
    assert path.read_bytes() == b'{"step": 1}\n'


def test_samples_that_a_resumed_run_writes_again_are_removed(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "text": "t"}) + "\n" for step in (3, 6)]
    (tmp_path / "samples.jsonl").write_text("".join(lines))
    MetricsLog(tmp_path, last_step=5, tensorboard=False).close()
    assert (tmp_path / "samples.jsonl").read_text() == lines[0]


def test_counters_survive_json() -> None:
    totals = Totals()
    step: dict[str, Any] = {"trainable_tokens": 3, "real_tokens": 5, "positions": 8}
    totals.add_step(loss=0.1, grad_norm=2.0, seconds=0.3, **step)
    totals.add_step(loss=0.7, grad_norm=1.0, seconds=0.1, **(step | {"trainable_tokens": 9}))
    assert totals.window.mean_loss == pytest.approx((0.1 * 3 + 0.7 * 9) / 12)
    assert totals.run.rate(totals.run.real_tokens) == pytest.approx(10 / 0.4)
    assert Totals.from_json(json.loads(json.dumps(totals.to_json()))) == totals
    totals.close_window(2)
    assert (totals.window.steps, totals.run.steps, totals.logged_step) == (0, 2, 2)


def test_the_best_evaluation_is_the_lowest_after_a_step() -> None:
    totals = Totals()
    losses = {0: 1.0, 2: 3.0, 4: 2.0, 6: 2.0, 8: 2.5}
    best = {step for step, loss in losses.items() if totals.add_evaluation(step, loss)}
    assert best == {2, 4}
    assert (totals.best_step, totals.eval_loss_best) == (4, 2.0)
    assert (totals.eval_loss_first, totals.eval_loss_last, totals.evaluated_step) == (1.0, 2.5, 8)


def test_perplexity_does_not_overflow() -> None:
    assert perplexity(1e6) == float("inf")


@pytest.mark.parametrize(
    "changes",
    [{"epochs": 0}, {"accumulation": 0}, {"save_every": -1}, {"seed": -1}, {"log_every": 0}],
    ids=lambda changes: next(iter(changes)),
)
def test_counts_that_cannot_be_meant_are_refused(changes: dict[str, int]) -> None:
    values: dict[str, Any] = {"model": "m", "output": "o", "dataset": DataConfig(data="d")}
    with pytest.raises(FabricError, match=next(iter(changes))):
        FinetuneConfig(**(values | changes))
