"""How fast is LoRA fine-tuning: seconds an epoch, tokens a second, share of what the device can do?

An epoch is the 264 biomedical rows of the published tables (``biomed_rows.py``): one row a step at
128 positions as published, packed into such rows, and packed into rows of 512, 16 a step, as one
would today. Tokens are
counted three ways: trainable (with a loss), real (not padding), positions (padding too).

    fabric-jax sweep experiments.finetune_throughput --platform cpu --out DIR model=bitnet-125m
    fabric-jax sweep experiments.finetune_throughput --platform cuda --cache CACHE --out DIR

With ``data=train.jsonl tokenizer=vocab.gguf`` it is the file's own rows. Two minutes on two cores
for the smallest model; on a GPU ten to thirty seconds a cell, most of it compiling, which
``compile_only=true --jobs 8`` beforehand, with the same cache, does for all at once.
``experiments/on_cuda.sh`` runs this and ``vram`` so.
"""

import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

from experiments.job import (
    BITNET,
    Recipe,
    StepConfig,
    build,
    device_share,
    memory_config,
    picked_implementation,
    settings_of,
    unrolls,
)
from fabric_jax.sweeps import Figure, NotOnThisPlatform, current_platform, own_turn

COLUMNS = (
    *("epoch_seconds", "step_seconds", "trainable_tokens_per_second", "real_tokens_per_second"),
    *("positions_per_second", "model_flop_utilisation", "of_roofline"),
)
FIGURE = Figure(x="model", y="positions_per_second", series="shape", log="y", kind="bar")
TIMEOUT_SECONDS = 1800
LEAST_STEPS = 6


@dataclass(frozen=True, kw_only=True)
class Config(StepConfig):
    """An epoch of a job.

    Attributes:
        shape: ``published`` is one padded row of 128 positions a step; ``packed`` the same with
            several documents a row; ``current`` 16 packed rows of 512 in the recipe ``ours``, on a
            CUDA device with one update after the backward pass and layers' inputs in the host's
            memory; ``custom`` what rows, length, packing and recipe say.
        packing: several documents a row.
        budget_seconds: after this the epoch is left, and its time is that of its steps so far
            times their number; 0 for the whole epoch.
        compile_only: nothing runs.
        data: a file of rows; empty for random tokens in rows of the published lengths.
        tokenizer: for these.
        seed: of weights and adapter.
    """

    recipe: Recipe = "fast"
    shape: str = "published"
    packing: bool = False
    budget_seconds: float = 4.0
    compile_only: bool = False
    data: str = ""
    tokenizer: str = ""
    seed: int = 0


def config() -> Config:
    return Config()


def cells(base: Config) -> list[Config]:
    shapes: dict[str, dict[str, Any]] = {
        "published": {"rows": 1, "length": 128, "packing": False},
        "packed": {"rows": 1, "length": 128, "packing": True},
        # What is kept of 8,192 positions without recomputing anything is more than a device has.
        "current": {"rows": 16, "length": 512, "packing": True, "recipe": "ours"},
    }
    if base.shape == "custom":
        return [replace(base, model=model) for model in BITNET]
    return [
        replace(base, model=model, shape=shape, **settings)
        for shape, settings in shapes.items()
        for model in BITNET
    ]


def environment(cell: Config, platform: str) -> dict[str, str]:
    return device_share(cell, platform)


def job_of(cell: Config) -> Any:
    """The ``MemoryConfig`` of a cell.

    An update within the backward pass spares a gradient of 4 bytes a trained weight, little beside
    the activations of ``current``, and costs a GPU a hundred launches a layer. What that keeps of
    each layer, 34 MB of ``bitnet-1b``, is sent to the host's memory, which takes a GPU no time.
    """
    config = memory_config(cell)
    if cell.shape == "current" and current_platform() == "cuda":
        return replace(config, fused_update=False, remat="offload")
    return config


def measure(cell: Config) -> dict[str, Any]:
    from experiments.step_costs import step_costs
    from fabric_jax.measurement.targets import TargetUnavailable, make_program
    from fabric_jax.training.memory_account import predict

    platform = current_platform()
    config = job_of(cell)
    built = build(config, unroll=unrolls(cell))
    arrays, _ = predict(
        built.definition,
        config.optimizer,
        rows=cell.rows,
        length=cell.length,
        fused=config.fused_update,
    )
    costs = step_costs(built.definition, arrays, rows=cell.rows, length=cell.length)
    metrics: dict[str, Any] = {
        "implementation": picked_implementation(config),
        "settings": settings_of(config) | {"unroll": unrolls(cell)},
        "model_operations": costs.operations,
        "least_bytes": costs.bytes,
    }
    if cell.compile_only or platform not in ("cpu", "cuda"):
        try:
            program = make_program(built.step, built.abstract_arguments(), platform)
        except TargetUnavailable as reason:
            raise NotOnThisPlatform(str(reason)) from reason
        return metrics | program.metrics()
    return metrics | _run(cell, built, costs)


def _run(cell: Config, built: Any, costs: Any) -> dict[str, Any]:
    """The epoch, and the device's limits in the same process."""
    from fabric_jax.measurement.limits import measure_limits
    from fabric_jax.measurement.memory import peak_memory_bytes

    start = time.perf_counter()
    step = built.step.lower(*built.abstract_arguments()).compile()
    compiling = time.perf_counter() - start
    batches = epoch_batches(cell, built.definition.config.vocab_size)
    with own_turn():
        before = time.process_time()
        seconds, losses = run_epoch(cell, built, step, batches)
        processor = time.process_time() - before
        peak = peak_memory_bytes()
        limits = measure_limits()
    each = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    complete = len(seconds) == len(batches)
    counts = {
        "trainable_tokens": int(sum(b.loss_mask.sum() for b in batches)),
        "real_tokens": int(sum((b.segment_ids > 0).sum() for b in batches)),
        "positions": sum(b.tokens.size for b in batches),
    }
    epoch = sum(seconds) if complete else each * len(batches)
    least = costs.seconds(limits.operations, limits.bytes)
    return {
        "epoch_seconds": epoch,
        "epoch_steps": len(batches),
        "steps_run": len(seconds),
        "step_seconds": each,
        "step_low_seconds": low,
        "step_high_seconds": high,
        # Of all threads, weights and warm-up included; other work on the machine is not in it.
        "processor_seconds": processor,
        **counts,
        **{f"{name}_per_second": count / epoch for name, count in counts.items()},
        "model_flop_utilisation": costs.operations / each / limits.operations,
        "roofline_seconds": least,
        "of_roofline": least / each,
        "limit_operations_per_second": limits.operations,
        "limit_operation": limits.operation,
        "limit_bytes_per_second": limits.bytes,
        "compile_seconds": compiling,
        "peak_bytes": peak,
        "loss_first": losses[0],
        "loss_last": losses[-1],
    }


def run_epoch(
    cell: Config, built: Any, step: Any, batches: list[Any]
) -> tuple[list[float], list[float]]:
    """Seconds and loss of each step; two steps that don't count come first.

    A step's loss is read while the next one runs, as the training loop does.
    """
    import jax
    import numpy as np

    from fabric_jax.models.initialize import initialize_adapter, initialize_base
    from fabric_jax.training.step import init_state

    frozen = initialize_base(built.definition, cell.seed)
    state = init_state(initialize_adapter(built.definition, cell.seed), built.optimizer)
    key = jax.random.key(cell.seed)
    for _ in range(2):
        state, metrics = step(state, frozen, batches[0], key)
        float(metrics.loss)
    ahead = jax.default_backend() != "cpu"
    seconds: list[float] = []
    losses: list[float] = []
    begin = last = time.perf_counter()
    pending = None
    for batch in batches:
        state, metrics = step(state, frozen, batch, key)
        if pending is not None or not ahead:
            losses.append(float(metrics.loss if pending is None else pending))
            now = time.perf_counter()
            seconds.append(now - last)
            last = now
        pending = metrics.loss if ahead else None
        spent = last - begin
        if cell.budget_seconds and spent > cell.budget_seconds and len(seconds) >= LEAST_STEPS:
            break
    if pending is not None:
        losses.append(float(pending))
        seconds.append(time.perf_counter() - last)
    if not np.all(np.isfinite(losses)):
        raise ValueError(f"a step gave a loss of {losses}")
    return seconds, losses


def epoch_batches(cell: Config, vocabulary: int) -> list[Any]:
    """Of the file where one is given, else random tokens in rows of the published lengths."""
    from experiments.biomed_rows import batches_of_an_epoch

    if not cell.data:
        return batches_of_an_epoch(
            cell.length, cell.rows, packing=cell.packing, vocabulary=vocabulary
        )
    from fabric_jax.data.config import DataConfig
    from fabric_jax.data.load import load_data
    from fabric_jax.data.tokenizer import load_tokenizer

    dataset = DataConfig(
        data=cell.data,
        tokenizer=cell.tokenizer,
        max_length=cell.length,
        batch_size=cell.rows,
        packing=cell.packing,
    )
    return list(load_data(dataset, load_tokenizer(cell.tokenizer), accumulation=1).train.epoch())
