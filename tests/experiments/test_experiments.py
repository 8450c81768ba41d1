"""The experiments: their cells, and what they measure on the smallest model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fabric_kernels import Packing

from experiments import finetune_throughput, lossless, vram
from experiments.biomed_rows import LENGTHS, batches_of_an_epoch, rows_of_an_epoch
from experiments.job import build, device_share, memory_config
from experiments.step_costs import step_costs
from fabric_jax.measurement.categories import adapter_parameters
from fabric_jax.measurement.targets import make_program
from fabric_jax.models.registry import REGISTRY, get_config
from fabric_jax.report.claims import all_verdicts
from fabric_jax.report.published import published
from fabric_jax.report.records_index import Index
from fabric_jax.sweeps.experiment import PLATFORMS
from fabric_jax.sweeps.records import read_folder
from fabric_jax.sweeps.runner import SweepOptions, plan
from fabric_jax.training.memory_account import predict
from tests.kernels.conftest import need_cpu_kernels

ROOT = Path(__file__).resolve().parents[2]
OWN = ("__init__",)
"""Modules with a command of their own."""
EXPERIMENTS = [
    *("vram", "finetune_throughput", "lossless", "biomed", "kernels", "decode_throughput"),
    "host_decode",
    *(
        f"ablations.{path.stem}"
        for path in sorted((ROOT / "experiments/ablations").glob("*.py"))
        if path.stem not in OWN
    ),
]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_cells_and_says_how_it_is_run(name: str, tmp_path: Path) -> None:
    options = SweepOptions(experiment=f"experiments.{name}", platform="cuda", out=str(tmp_path))
    experiment, tasks = plan(options)
    assert experiment.question.endswith("?")
    assert len({task.draft.digest for task in tasks}) == len(tasks) > 1
    assert len({task.draft.name for task in tasks}) == len(tasks)
    source = (ROOT / "experiments" / f"{name.replace('.', '/')}.py").read_text()
    assert f"fabric-jax sweep experiments.{name}" in source
    again = SweepOptions(
        experiment=f"experiments.{name}",
        platform="cuda",
        out=str(tmp_path),
        overrides=tuple(tasks[-1].draft.command.partition("--out DIR ")[2].split()),
    )
    assert [task.draft.digest for task in plan(again)[1]] == [tasks[-1].draft.digest]


def test_vram_has_every_published_row() -> None:
    cells = {(cell.model, cell.weights, cell.recipe) for cell in vram.cells(vram.config())}
    for model, formats in published()["vram_mib"].items():
        for weights, figure in formats.items():
            for recipe in ("seed", "ours"):
                assert figure is None or (model, weights, recipe) in cells
    assert {cell.model for cell in vram.cells(vram.config())} <= set(REGISTRY)


def test_vram_as_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FABRIC_SWEEP_PLATFORM", "cpu")
    found = vram.measure(vram.Config(model="bitnet-tiny", recipe="ours"))
    assert found["kind"] == "compiled"
    assert sum(found["category_bytes"].values()) == found["compiled_bytes"]
    assert "peak_bytes" not in found


@pytest.mark.parametrize("packing", ["ternary2", "ternary1.6"])
def test_products_alone_change_nothing(packing: Packing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed weights through compiled kernels, against float32 masters through XLA."""
    need_cpu_kernels()
    monkeypatch.setenv("FABRIC_SWEEP_PLATFORM", "cpu")
    cell = lossless.Config(implementation="cpu", sides="xla", packing=packing, rows=2, length=24)
    found = lossless.measure(cell)
    assert found["positions"] == 48
    assert (found["kl_max"], found["top1_agreement"]) == (0.0, 1.0)


@pytest.mark.parametrize("platform", ["rocm", "metal"])
def test_a_step_lowers_to_platforms_without_a_compiler(
    platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FABRIC_SWEEP_PLATFORM", platform)
    config: Any = memory_config(vram.Config(model="bitnet-tiny", recipe="ours"))
    assert config.implementation == "xla"
    # Tables choose by this process's device, which in a sweep's process offers XLA alone.
    monkeypatch.setattr("fabric_kernels.cpu_library.available", lambda: False)
    built = build(config)
    program = make_program(built.step, built.abstract_arguments(), platform)
    assert program.kind == "lowered"
    assert program.metrics()["module_bytes"] > 10_000
    assert "compiled_bytes" not in program.metrics()


def test_an_epoch_is_that_of_the_published_rows() -> None:
    assert len(LENGTHS) == 264
    assert sum(LENGTHS) == 18_166
    padded = batches_of_an_epoch(128, 1, packing=False, vocabulary=32002)
    assert len(padded) == 264
    assert sum(batch.tokens.size for batch in padded) == 264 * 128
    packed = batches_of_an_epoch(512, 16, packing=True, vocabulary=32002)
    for batches in (padded, packed):
        # As `fabric-jax finetune` counts them: n tokens between two others take n + 1 positions.
        assert sum(int(batch.loss_mask.sum()) for batch in batches) == 18_166 + 264
    assert len(rows_of_an_epoch(128, packing=True)) == 175
    one = packed[0]
    starts = (one.positions == 0) & (one.segment_ids > 0)
    assert starts.sum() == sum(len(np.unique(row[row > 0])) for row in one.segment_ids[0])


def test_costs_of_a_step_count_the_model_once() -> None:
    model = get_config("bitnet-125m")
    config: Any = memory_config(finetune_throughput.Config(model="bitnet-125m"))
    built = build(config)
    arrays, _ = predict(built.definition, config.optimizer, rows=1, length=128, fused=False)
    one = step_costs(built.definition, arrays, rows=1, length=128)
    head = model.vocab_size * model.hidden_size
    least = 128 * (4 * (model.linear_parameters + head))
    assert least < one.operations < 1.1 * least
    assert step_costs(built.definition, arrays, rows=4, length=128).operations == (
        4 * one.operations
    )
    weights = arrays.weights + arrays.scales + arrays.embedding_and_head
    trained = adapter_parameters(model, config.lora)
    assert one.bytes == pytest.approx(2 * weights + (8 + 16 + 8) * trained, rel=1e-3)
    assert one.seconds(1e12, 1e12) == one.operations / 1e12
    assert one.seconds(1e15, 1e9) == one.bytes / 1e9


def test_an_epoch_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FABRIC_SWEEP_PLATFORM", "cpu")
    cell = finetune_throughput.Config(
        model="bitnet-tiny", shape="custom", rows=2, length=32, packing=True, budget_seconds=1e-3
    )
    config: Any = memory_config(cell)
    built = build(config)
    step = built.step.lower(*built.abstract_arguments()).compile()
    batches = finetune_throughput.epoch_batches(cell, 260)
    seconds, losses = finetune_throughput.run_epoch(cell, built, step, batches)
    assert len(seconds) == len(losses) == finetune_throughput.LEAST_STEPS < len(batches)
    assert min(seconds) > 0
    assert losses[0] == pytest.approx(np.log(260), rel=0.15)


def test_shares_of_a_device_are_what_cells_need() -> None:
    def share(**settings: Any) -> float:
        cell = vram.Config(**settings)
        return float(device_share(cell, "cuda")["XLA_PYTHON_CLIENT_MEM_FRACTION"])

    assert share(model="bitnet-125m") < 0.06
    assert share(model="gemma-3-12b", weights="float16") > 25 / 80
    assert share(model="bitnet-13b", recipe="seed") > share(model="bitnet-13b", recipe="ours")
    assert device_share(vram.Config(), "cpu") == {}


def test_records_of_the_repository_are_valid_and_answer_every_claim() -> None:
    places = read_folder(ROOT / "experiments/results/records")
    for where, record in places:
        # Bundles of on_cuda.sh hold all ablations.
        group = record.experiment.split(".")[0]
        assert where.startswith((f"{record.experiment}-", f"{group}-")), where
        assert record.experiment in EXPERIMENTS
        assert record.kind == PLATFORMS[record.platform] or record.kind == "compiled"
    report = (ROOT / "experiments/results/records/report.md").read_text()
    found = all_verdicts(Index(tuple(places)))
    assert len(found) == 7
    for verdict in found:
        assert f"**{verdict.claim}: {verdict.verdict}.**" in report, "the report is an older one"
