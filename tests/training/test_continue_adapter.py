"""Fine-tuning that starts from an adapter."""

import io
import json

import pytest
from rich.console import Console

from fabric_jax.checkpoints.adapters import load_adapter, read_lora_config
from fabric_jax.checkpoints.gguf.adapter import save_gguf_adapter
from fabric_jax.errors import FabricError
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.training.loop import finetune
from tests.training.conftest import MICRO
from tests.training.runs import adapter_bytes, metrics

LORA = LoraConfig(rank=2, ranks=(("down", 4),), alphas=(("q", 5.0),), rslora=True)


@pytest.fixture(scope="module")
def first(tmp_path_factory, configure, compiled_once):
    """A short run, and its adapter as a GGUF file too."""
    output = tmp_path_factory.mktemp("runs") / "first"
    summary = finetune(configure(output, lora=LORA, max_steps=4), console=Console(quiet=True))
    definition = define_decoder(MICRO, DecoderOptions(lora=LORA))
    tree = load_adapter(output / "adapter", definition)
    save_gguf_adapter(output / "adapter.gguf", definition, tree)
    return output, summary


@pytest.mark.parametrize("name", ["adapter", "adapter.gguf"])
@pytest.mark.slow
def test_it_starts_at_the_loss_that_the_adapter_ended_with(
    name, first, tmp_path, configure, compiled_once
):
    output, summary = first
    # Settings are the adapter's; none need be given.
    config = configure(
        tmp_path / "again", lora=LoraConfig(), adapter=str(output / name), max_steps=2
    )
    again = finetune(config, console=Console(quiet=True))
    assert summary.eval_loss_last < summary.eval_loss_first
    assert again.eval_loss_first == pytest.approx(summary.eval_loss_last, rel=1e-6)
    assert again.eval_loss_last != again.eval_loss_first
    stored = read_lora_config(tmp_path / "again" / "adapter", MICRO)
    assert stored == LORA.__class__(**{**LORA.__dict__, "targets": stored.targets})
    assert adapter_bytes(tmp_path / "again") != adapter_bytes(output)
    assert [line["step"] for line in metrics(tmp_path / "again") if "step" in line] == [1, 2]


def test_other_settings_than_the_adapters_are_refused(first, tmp_path, configure):
    output, _ = first
    given = {"adapter": str(output / "adapter"), "lora": LoraConfig(ranks=(("down", 3),))}
    with pytest.raises(FabricError, match=r"has another LoRA ranks.*\('down', 4\)"):
        finetune(configure(tmp_path / "again", **given), console=Console(quiet=True))


def test_layers_that_differ_are_told(first, tmp_path, configure, compiled_once):
    output, _ = first
    copied = tmp_path / "a"
    copied.mkdir()
    for path in (output / "adapter").iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    path = copied / "adapter_config.json"
    config = json.loads(path.read_text())
    config["alpha_pattern"] = {r"layers\.1\.mlp\.up_proj": 2} | config["alpha_pattern"]
    path.write_text(json.dumps(config))
    run = configure(tmp_path / "again", lora=LoraConfig(), adapter=str(copied), max_steps=1)
    said = io.StringIO()
    finetune(run, console=Console(width=200, file=said))
    assert "differ in rank or scale (up)" in said.getvalue()
