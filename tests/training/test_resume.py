"""Runs that stop and go on: bit for bit, or not at all."""

import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fabric_jax.checkpoints.native import save_model
from fabric_jax.errors import FabricError
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.initialize import initialize_base
from fabric_jax.training.config import FinetuneConfig
from fabric_jax.training.loop import finetune
from fabric_jax.training.summary import Summary
from tests.training.conftest import MICRO, Configure
from tests.training.runs import adapter_bytes, crash_at_batch, metrics, steps_saved, timeless

pytestmark = [pytest.mark.usefixtures("compiled_once"), pytest.mark.xdist_group("training")]


def test_a_crashed_run_goes_on_bit_for_bit(
    whole: tuple[FinetuneConfig, Summary],
    tmp_path: Path,
    quiet: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The checkpoint is of step 5 and the crash in step 8, so line 6 is cut off again."""
    reference, summary = whole
    config = replace(reference, output=str(tmp_path / "run"), save_every=5)
    with crash_at_batch(8, monkeypatch):
        finetune(config, console=quiet)
    output = Path(config.output)
    assert metrics(output)[-1]["step"] > max(steps_saved(output))
    resumed = finetune(replace(config, resume="auto", save_every=2, keep_last=3), console=quiet)
    assert adapter_bytes(output) == adapter_bytes(Path(reference.output))
    assert adapter_bytes(output, "adapter_best") == adapter_bytes(
        Path(reference.output), "adapter_best"
    )
    assert timeless(output) == timeless(Path(reference.output))
    for key in ("loss_first", "loss_last", "eval_loss_first", "eval_loss_best", "best_step"):
        assert getattr(resumed, key) == getattr(summary, key)
    assert resumed.real_tokens == summary.real_tokens
    assert resumed.steps == 8


def test_a_run_goes_on_bit_for_bit_in_another_packing(
    whole: tuple[FinetuneConfig, Summary],
    tmp_path: Path,
    quiet: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference, _ = whole
    config = replace(reference, output=str(tmp_path / "run"), save_every=5)
    with crash_at_batch(8, monkeypatch):
        finetune(replace(config, weights="ternary2"), console=quiet)
    finetune(replace(config, weights="ternary1.6", resume="auto"), console=quiet)
    assert adapter_bytes(Path(config.output)) == adapter_bytes(Path(reference.output))
    assert timeless(Path(config.output)) == timeless(Path(reference.output))


def test_a_finished_run_is_exported_again_without_training(
    whole: tuple[FinetuneConfig, Summary], quiet: Console
) -> None:
    config, summary = whole
    output = Path(config.output)
    before = adapter_bytes(output), timeless(output)
    (output / "adapter" / "adapter_model.safetensors").unlink()
    again = finetune(replace(config, resume="auto"), console=quiet)
    assert (adapter_bytes(output), timeless(output)) == before
    assert again.loss_last == summary.loss_last
    assert again.compile_seconds == 0


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(
    whole: tuple[FinetuneConfig, Summary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, _ = whole
    config = replace(reference, output=str(tmp_path / "run"), save_every=2)
    output = Path(config.output)
    with crash_at_batch(8, monkeypatch):
        finetune(config, console=Console(quiet=True))
    newest = steps_saved(output)[-1]
    for path in (output / "checkpoints" / str(newest) / "params" / "d").iterdir():
        path.write_bytes(path.read_bytes()[:-20])
    with (tmp_path / "out").open("w") as file:
        finetune(replace(config, resume="auto"), console=Console(file=file))
    text = (tmp_path / "out").read_text()
    assert f"checkpoint {output / 'checkpoints' / str(newest)} is damaged" in text
    assert "resuming after step" in text
    assert adapter_bytes(output) == adapter_bytes(Path(reference.output))


def test_more_steps_follow_on_under_the_constant_schedule(
    tmp_path: Path, configure: Configure, quiet: Console
) -> None:
    optimizer = {"learning_rate": 0.5, "schedule": "constant", "warmup_steps": 2}
    long = configure(tmp_path / "long", optimizer=optimizer, max_steps=6)
    finetune(long, console=quiet)
    short = replace(long, output=str(tmp_path / "short"), max_steps=4)
    finetune(short, console=quiet)
    finetune(replace(short, max_steps=6, resume="auto"), console=quiet)
    assert adapter_bytes(tmp_path / "short") == adapter_bytes(tmp_path / "long")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"optimizer": {"learning_rate": 3e-3}}, "optimizer.learning_rate is 0.01"),
        ({"max_steps": 7}, "optimizer.total_steps is 8 in the checkpoint, 7 here"),
        ({"lora": LoraConfig(rank=2, dropout=0.1)}, "lora.rank is 4 in the checkpoint, 2 here"),
        ({"lora": LoraConfig(rank=4)}, "lora.dropout"),
        ({"seed": 1}, "seed is 0 in the checkpoint, 1 here"),
        ({"accumulation": 2}, "accumulation is 1 in the checkpoint, 2 here"),
        ({"dataset": {"max_length": 16}}, "dataset.max_length"),
        ({"act_quant": "none"}, "act_quant"),
        ({"model": "bitnet-tiny"}, "model.hidden_size"),
        ({"dataset": {"data": "OTHER"}}, "data is "),
        ({"model": "OTHER"}, "weights is "),
    ],
    ids=lambda value: value.split(" is ")[0] if isinstance(value, str) else "",
)
def test_other_settings_are_not_resumed_but_named(
    changes: dict[str, Any],
    named: str,
    whole: tuple[FinetuneConfig, Summary],
    configure: Configure,
    tmp_path: Path,
    quiet: Console,
) -> None:
    reference, _ = whole
    if changes.get("dataset", {}).get("data"):
        other = tmp_path / "rows.jsonl"
        other.write_text(Path(reference.dataset.data).read_text().replace("says", "said"))
        changes = {"dataset": {"data": str(other)}}
    if changes.get("model") == "OTHER":
        definition = define_decoder(MICRO, DecoderOptions())
        base = initialize_base(definition, 1)
        save_model(tmp_path / "model", definition, base, tokenizer_json=None)
        changes = {"model": str(tmp_path / "model")}
    config = configure(Path(reference.output), eval_every=4, resume="auto", **changes)
    before = adapter_bytes(Path(reference.output))
    with pytest.raises(FabricError, match="another run") as caught:
        finetune(config, console=quiet)
    assert named in str(caught.value)
    assert adapter_bytes(Path(reference.output)) == before


def test_where_files_lie_does_not_matter(
    whole: tuple[FinetuneConfig, Summary], tmp_path: Path, quiet: Console
) -> None:
    reference, summary = whole
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(Path(reference.dataset.data).read_bytes())
    again = replace(reference, resume="auto", dataset=replace(reference.dataset, data=str(moved)))
    assert finetune(again, console=quiet).loss_last == summary.loss_last


def test_a_run_is_not_overwritten(whole: tuple[FinetuneConfig, Summary], quiet: Console) -> None:
    config, _ = whole
    with pytest.raises(FabricError, match="--resume auto"):
        finetune(replace(config, resume="never"), console=quiet)


def test_a_full_disk_is_reported_and_earlier_checkpoints_stay(
    tmp_path: Path, configure: Configure, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(tmp_path / "run", save_every=2, tensorboard=False)
    with crash_at_batch(4, monkeypatch):
        finetune(config, console=quiet)
    saved = steps_saved(tmp_path / "run")
    assert saved
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Files beyond this size fail to be written, as on a full disk; metrics and config are smaller.
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
    try:
        with pytest.raises(FabricError, match="cannot save a checkpoint in") as caught:
            finetune(replace(config, resume="auto"), console=quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path / "run") in str(caught.value)
    assert steps_saved(tmp_path / "run") == saved
    finetune(replace(config, resume="auto"), console=quiet)
