"""Runs on a float base whose linears are stored in another format."""

from dataclasses import replace
from pathlib import Path

import pytest

from fabric_jax.checkpoints.native import save_model
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.initialize import initialize_base
from fabric_jax.training.loop import finetune
from fabric_jax.training.memory_account import MemoryConfig, account
from tests.models.baseline_models import QWEN3
from tests.training.conftest import MICRO, Configure
from tests.training.runs import metrics

pytestmark = [pytest.mark.usefixtures("compiled_once"), pytest.mark.xdist_group("training")]


@pytest.mark.slow
def test_losses_stay_near_those_of_floats(configure: Configure, tmp_path: Path) -> None:
    config = replace(QWEN3, vocab_size=MICRO.vocab_size)
    definition = define_decoder(config, DecoderOptions(mode="float"))
    base = initialize_base(definition, 0)
    save_model(tmp_path / "model", definition, base, tokenizer_json=None)
    losses: dict[str, list[float]] = {}
    for kind in ("float", "int8", "int4"):
        run = configure(tmp_path / kind, model=str(tmp_path / "model"), weights=kind, max_steps=4)
        finetune(run)
        losses[kind] = [line["loss"] for line in metrics(Path(run.output)) if "loss" in line]
    assert losses["int8"] == pytest.approx(losses["float"], rel=0.01)
    assert losses["int4"] == pytest.approx(losses["float"], rel=0.05)
    assert losses["int4"] != losses["int8"] != losses["float"]


@pytest.mark.parametrize("weights", ["bfloat16", "float16", "int8", "int4"])
@pytest.mark.slow
def test_the_account_knows_the_format(weights: str) -> None:
    config = MemoryConfig(
        model="qwen3-0.6b", weights=weights, remat="layer", lora=LoraConfig(rank=4)
    )
    found = account(config)
    bits = {"bfloat16": 16, "float16": 16, "int8": 8.5, "int4": 4.5}[weights]
    linears = 28 * 1024 * (2048 + 2 * 1024 + 2048 + 3 * 3072)
    assert found.arrays.weights == linears * bits / 8
    assert found.compiled is not None
    arrays = found.arrays
    known = arrays.base + arrays.adapters + arrays.optimizer
    assert 0 <= found.compiled.arguments - known < 64 << 10
    assert found.analytic == pytest.approx(found.compiled.total, rel=0.15)
