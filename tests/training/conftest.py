"""A model of 32 channels in a folder, rows to train it on, compiled programs that are reused."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

from experiments.fault_processes import MICRO
from fabric_jax.checkpoints.native import save_model
from fabric_jax.data.config import DataConfig
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.decoder import DecoderDefinition, DecoderOptions, define_decoder
from fabric_jax.models.initialize import initialize_base
from fabric_jax.training.config import FinetuneConfig, OptimizerConfig
from fabric_jax.training.loop import finetune
from fabric_jax.training.summary import Summary

Configure = Callable[..., FinetuneConfig]


@pytest.fixture(scope="session")
def micro_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random packed weights of ``MICRO``."""
    folder = tmp_path_factory.mktemp("models") / "micro"
    definition = define_decoder(MICRO, DecoderOptions())
    save_model(folder, definition, initialize_base(definition, 0), tokenizer_json=None)
    return folder


@pytest.fixture(scope="session")
def text_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short rows of text."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"text": f"row {i} says {'word ' * (i % 5)}{i * i}"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def configure(micro_model: Path, text_rows: Path) -> Configure:
    """``configure(output, dataset={...}, optimizer={...}, ...)``: a run of a second or so."""

    def make(output: Path, **changes: Any) -> FinetuneConfig:
        dataset: dict[str, Any] = {
            "data": str(text_rows),
            "eval_fraction": 0.2,
            "max_length": 32,
            "batch_size": 2,
        } | changes.pop("dataset", {})
        optimizer: dict[str, Any] = {"learning_rate": 1e-2} | changes.pop("optimizer", {})
        settings: dict[str, Any] = {
            "model": str(micro_model),
            "lora": LoraConfig(rank=4, dropout=0.1),
            "save_every": 0,
            "max_steps": 8,
            "epochs": 2,
        }
        return FinetuneConfig(
            output=str(output),
            dataset=DataConfig(**dataset),
            optimizer=OptimizerConfig(**optimizer),
            **(settings | changes),
        )

    return make


@pytest.fixture
def quiet() -> Console:
    """A console that prints nothing."""
    return Console(quiet=True)


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for JAX's cache of compiled programs."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def compiled_once(programs: Path) -> Iterator[None]:
    """Equal programs are compiled once, whichever test needs them: XLA takes seconds for each."""
    settings = {
        "jax_compilation_cache_dir": str(programs),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def micro_definition() -> DecoderDefinition:
    """``MICRO`` packed, with an adapter of rank 4 on every linear."""
    return define_decoder(MICRO, DecoderOptions(lora=LoraConfig(rank=4)))


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, configure: Configure, compiled_once: None
) -> tuple[FinetuneConfig, Summary]:
    """A run of 8 steps and about two epochs that nothing interrupted."""
    config = configure(tmp_path_factory.mktemp("runs") / "whole", eval_every=4)
    return config, finetune(config, console=Console(quiet=True))
