"""Training from random weights, through the same loop."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from fabric_jax.checkpoints.loading import load_base
from fabric_jax.checkpoints.native import load_model_folder
from fabric_jax.data.config import DataConfig
from fabric_jax.models.initialize import initialize_base
from fabric_jax.models.registry import REGISTRY
from fabric_jax.training.config import OptimizerConfig, PretrainConfig
from fabric_jax.training.loop import pretrain
from tests.training.conftest import MICRO
from tests.training.runs import crash_at_batch

pytestmark = [pytest.mark.usefixtures("compiled_once"), pytest.mark.xdist_group("training")]


def test_training_from_random_weights_gives_a_model_that_packs(
    tmp_path: Path, text_rows: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REGISTRY, "micro", MICRO)
    config = PretrainConfig(
        model="micro",
        output=str(tmp_path / "run"),
        dataset=DataConfig(data=str(text_rows), max_length=32, batch_size=2),
        optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=0.1),
        optimizer_defaults="plain",
        rows="packed",
        max_steps=6,
        save_every=4,
    )
    with crash_at_batch(6, monkeypatch):
        pretrain(config, console=quiet)
    summary = pretrain(replace(config, resume="auto"), console=quiet)
    whole = pretrain(replace(config, output=str(tmp_path / "whole")), console=quiet)
    assert summary.trained_parameters == summary.parameters == MICRO.parameters
    assert summary.loss_last is not None
    assert summary.loss_first is not None
    assert summary.loss_last < summary.loss_first
    assert summary.implementation is None
    weights = "model/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    definition, trained = load_model_folder(Path(whole.trained))
    assert definition.options.mode == "master"
    fresh = initialize_base(definition, config.seed)
    moved = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), trained, fresh)
    assert all(jax.tree.leaves(moved))
    assert load_base(whole.trained).definition.options.mode == "packed"
