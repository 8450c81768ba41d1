"""Whole fine-tuning runs of a very small model, and what they leave behind."""

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fabric_kernels import select_implementation
from rich.console import Console

from fabric_jax.checkpoints.loading import load_base
from fabric_jax.checkpoints.native import save_model
from fabric_jax.checkpoints.peft import load_adapter
from fabric_jax.data.load import load_data
from fabric_jax.data.tokenizer import load_tokenizer
from fabric_jax.errors import FabricError
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.initialize import initialize_adapter, initialize_base
from fabric_jax.training.config import FinetuneConfig
from fabric_jax.training.lock import locked_folder
from fabric_jax.training.loop import finetune
from fabric_jax.training.metrics import SCALARS
from fabric_jax.training.summary import Summary
from tests.training.conftest import MICRO, Configure
from tests.training.runs import adapter_bytes, crash_at_batch, metrics, steps_saved

pytestmark = [pytest.mark.usefixtures("compiled_once"), pytest.mark.xdist_group("training")]


def test_every_step_has_a_line(whole: tuple[FinetuneConfig, Summary]) -> None:
    config, _ = whole
    lines = metrics(Path(config.output))
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["step"] for line in lines if "eval_loss" in line] == [4, 8]
    for line in lines:
        assert line["positions_per_second"] >= line["real_tokens_per_second"]
        assert line["real_tokens_per_second"] >= line["trainable_tokens_per_second"] > 0
        assert line["peak_bytes"] > 2**20
        assert line["grad_norm"] > 0
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
    rates = [line["learning_rate"] for line in lines]
    assert rates[0] == pytest.approx(1e-2)
    assert rates == sorted(rates, reverse=True)


def test_summary_repeats_what_the_metrics_say(whole: tuple[FinetuneConfig, Summary]) -> None:
    config, summary = whole
    output = Path(config.output)
    lines = metrics(output)
    assert json.loads((output / "summary.json").read_text()) == summary.to_json()
    assert json.loads((output / "config.json").read_text()) == json.loads(
        json.dumps(asdict(config))
    )
    assert summary.steps == 8
    assert summary.loss_first == lines[0]["loss"]
    assert summary.loss_last == lines[-1]["loss"]
    assert summary.loss_last < summary.loss_first
    evaluations = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert summary.eval_loss_last == evaluations[8]
    assert summary.eval_loss_best == min(evaluations.values())
    assert evaluations[summary.best_step or 0] == summary.eval_loss_best
    assert summary.epochs == lines[-1]["epoch"]
    assert summary.positions == 8 * 2 * 32
    assert 0 < summary.trainable_tokens <= summary.real_tokens <= summary.positions
    assert summary.implementation == select_implementation()
    assert summary.seconds_per_step
    assert summary.seconds_per_step > 0
    # A (4, 32) and B (32, 4) on q k v o, (4, 32) and (64, 4) on gate and up, the mirror on down.
    assert summary.trained_parameters == 2 * (4 * (4 * 64) + 3 * (4 * 96))


def test_evaluation_is_the_mean_over_the_rows_set_aside(
    whole: tuple[FinetuneConfig, Summary],
) -> None:
    """Token by token through the whole logits, in float64, with the exported adapter."""
    config, summary = whole
    loaded = load_base(config.model, lora=replace(config.lora, dropout=0.0))
    data = load_data(config.dataset, load_tokenizer(""))
    assert data.evaluation is not None
    adapters = {
        "last": load_adapter(Path(config.output) / "adapter", loaded.definition),
        "first": initialize_adapter(loaded.definition, config.seed),
    }
    found: dict[str, float] = {}
    for name, adapter in adapters.items():
        decoder = loaded.definition.bind(loaded.base, adapter)
        total, count = 0.0, 0
        for batch in data.evaluation.epoch(0):
            hidden = decoder(batch.tokens, batch.positions, batch.segment_ids)
            logits = np.asarray(decoder.logits(hidden), np.float64)
            logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            for where in np.argwhere(np.asarray(batch.loss_mask) > 0):
                total -= logs[(*where, int(batch.targets[tuple(where)]))]
                count += 1
        found[name] = total / count
    assert summary.eval_loss_first == pytest.approx(found["first"], rel=1e-5)
    assert summary.eval_loss_last == pytest.approx(found["last"], rel=1e-5)


def test_tensorboard_holds_the_same_numbers(whole: tuple[FinetuneConfig, Summary]) -> None:
    config, summary = whole
    found: dict[tuple[str, int], float] = {}
    for path in (Path(config.output) / "tensorboard").iterdir():
        for name, step, value in read_scalars(path):
            assert (name, step) not in found
            found[name, step] = value
    for line in metrics(Path(config.output)):
        for field, name in SCALARS.items():
            if field in line:
                assert found.pop((name, line["step"])) == pytest.approx(line[field], rel=1e-6)
    assert found.pop(("eval/loss", 0)) == pytest.approx(summary.eval_loss_first)
    assert list(found) == [("eval/perplexity", 0)]


def read_scalars(path: Path) -> Iterator[tuple[str, int, float]]:
    """Scalars of an events file: records of length, checksum, protocol buffer, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    content, at = path.read_bytes(), 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        event = Event.FromString(content[at + 12 : at + 12 + length])
        at += 16 + length
        for value in event.summary.value:
            yield value.tag, event.step, value.simple_value


def test_two_runs_do_not_share_a_folder(
    tmp_path: Path, configure: Configure, quiet: Console
) -> None:
    with (
        locked_folder(tmp_path / "run"),
        pytest.raises(FabricError, match="another run writes to"),
    ):
        finetune(configure(tmp_path / "run"), console=quiet)
    with locked_folder(tmp_path / "run"):
        pass


def test_divergence_stops_the_run_and_is_not_saved(
    tmp_path: Path, configure: Configure, quiet: Console
) -> None:
    config = configure(tmp_path / "run", optimizer={"learning_rate": 1e30}, save_every=1)
    with pytest.raises(FabricError, match=r"diverged in step \d") as caught:
        finetune(config, console=quiet)
    step = int(str(caught.value).split("step ")[1].split(":")[0])
    assert step > 1
    assert max(steps_saved(tmp_path / "run")) < step
    assert not (tmp_path / "run" / "adapter").exists()
    assert all(math.isfinite(line["loss"]) for line in metrics(tmp_path / "run"))


def test_lines_of_several_steps_hold_their_mean(
    whole: tuple[FinetuneConfig, Summary],
    tmp_path: Path,
    quiet: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the run stopped between two lines."""
    reference, _ = whole
    config = replace(
        reference,
        output=str(tmp_path / "run"),
        log_every=5,
        save_every=2,
        eval_every=100,
        tensorboard=False,
    )
    with crash_at_batch(4, monkeypatch):
        finetune(config, console=quiet)
    finetune(replace(config, resume="auto"), console=quiet)
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [5, 8]
    losses = [line["loss"] for line in metrics(Path(reference.output))]
    for line, part in zip(lines, (losses[:5], losses[5:]), strict=True):
        assert min(part) < line["loss"] < max(part)
        # Rows are nearly full, so the weights of the steps are nearly equal.
        assert line["loss"] == pytest.approx(np.mean(part), rel=2e-2)


def test_the_best_checkpoint_stays_beside_the_newest(
    tmp_path: Path, configure: Configure, quiet: Console
) -> None:
    """The learning rate is so high that the first evaluation is the best."""
    config = configure(
        tmp_path / "run",
        optimizer={"learning_rate": 0.5, "schedule": "constant", "warmup_steps": 2},
        eval_every=2,
        save_every=1,
        keep_last=1,
    )
    summary = finetune(config, console=quiet)
    evaluations = {m["step"]: m["eval_loss"] for m in metrics(tmp_path / "run") if "eval_loss" in m}
    best = min(evaluations, key=lambda step: evaluations[step])
    assert summary.best_step == best
    assert steps_saved(tmp_path / "run") == sorted({best, 8})
    if best != 8:
        assert adapter_bytes(tmp_path / "run", "adapter_best") != adapter_bytes(tmp_path / "run")


def test_an_adapter_can_be_trained_further(
    whole: tuple[FinetuneConfig, Summary], tmp_path: Path, configure: Configure, quiet: Console
) -> None:
    reference, summary = whole
    first = str(Path(reference.output) / "adapter")
    config = configure(
        tmp_path / "run", adapter=first, lora=LoraConfig(), optimizer={"learning_rate": 0.0}
    )
    again = finetune(config, console=quiet)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(Path(reference.output))
    assert again.eval_loss_first == pytest.approx(summary.eval_loss_last, rel=1e-6)
    with pytest.raises(FabricError, match="another LoRA rank"):
        finetune(replace(config, output=str(tmp_path / "b"), lora=LoraConfig(rank=2)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": {"max_length": 65}}, "rows are longer than micro allows"),
        ({"dataset": {"data": "missing.jsonl"}}, "missing.jsonl"),
        ({"lora": LoraConfig(rank=33)}, "rank 33 exceeds a dimension"),
        ({"model": "bitnet-tinny"}, "Did you mean 'bitnet-tiny'"),
        ({"adapter": "missing"}, "missing"),
    ],
    ids=["max_length", "data", "rank", "model", "adapter"],
)
def test_what_cannot_work_is_refused_before_the_first_step(
    changes: dict[str, Any], message: str, tmp_path: Path, configure: Configure, quiet: Console
) -> None:
    with pytest.raises(FabricError) as caught:
        finetune(configure(tmp_path / "run", **changes), console=quiet)
    assert message in str(caught.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_output_that_is_a_file_is_refused(
    tmp_path: Path, configure: Configure, quiet: Console
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FabricError, match="cannot write"):
        finetune(configure(tmp_path / "file" / "run"), console=quiet)


def test_a_tokenizer_larger_than_the_model_is_refused(
    tmp_path: Path, configure: Configure, quiet: Console
) -> None:
    small = replace(MICRO, vocab_size=100)
    definition = define_decoder(small, DecoderOptions())
    save_model(tmp_path / "m", definition, initialize_base(definition, 0), tokenizer_json=None)
    with pytest.raises(FabricError, match="more tokens than micro"):
        finetune(configure(tmp_path / "run", model=str(tmp_path / "m")), console=quiet)


def test_plain_lines_tell_progress_where_there_is_no_terminal(
    tmp_path: Path, configure: Configure
) -> None:
    with (tmp_path / "out").open("w") as file:
        finetune(configure(tmp_path / "run", tensorboard=False), console=Console(file=file))
    text = (tmp_path / "out").read_text()
    assert "trainable tokens" in text.split("step 1/8")[0]
    for line in metrics(tmp_path / "run"):
        assert f"step {line['step']}/8  loss {line['loss']:.4f}" in text
    assert "trained/real/padded tokens/s" in text
    assert "peak" in text
    assert "left 0:00:00" in text
