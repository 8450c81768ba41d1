"""How much memory does LoRA fine-tuning take, for every row of the published tables?

Three columns: by dimensions, as compiled, and the device's peak where it runs (on CPU only with
``steps=2``, since the weights of the large models are made for that).

    fabric-jax sweep experiments.vram --platform cpu --out DIR
    fabric-jax sweep experiments.vram --platform cuda --jobs 8 --cache CACHE --out DIR
    fabric-jax sweep experiments.vram --platform tpu-v5e recipe=ours --out DIR

Eight minutes on two cores, compiled only; twelve on a GPU with 16 cores. A TPU's programs take
20 seconds a cell, and libtpu (``pip install 'jax[tpu]'``) in the environment that runs the command.
``experiments/on_cuda.sh`` runs this and ``finetune_throughput``.
"""

import os
from dataclasses import dataclass
from typing import Any

from experiments.job import (
    BITNET,
    StepConfig,
    build,
    device_share,
    memory_config,
    picked_implementation,
    settings_of,
)
from fabric_jax.sweeps import Figure, NotOnThisPlatform, current_platform, grid, runs_alone

TERNARY = (*BITNET, "bitnet-2b-4t")
QWEN = ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b")
FORMATS = ("int4", "int8", "float16", "float32")
# Their programs' autotuning needs more memory than they do.
SMALL = ("bitnet-125m", "bitnet-350m")
COLUMNS = ("analytic_bytes", "compiled_bytes", "peak_bytes")
FIGURE = Figure(x="model", y="category_bytes", series="recipe", kind="stack")
TIMEOUT_SECONDS = 900


@dataclass(frozen=True, kw_only=True)
class Config(StepConfig):
    """A job, and how many steps of it run; None: three on a GPU, none elsewhere."""

    steps: int | None = None


def config() -> Config:
    return Config()


def cells(base: Config) -> list[Config]:
    """Every row of the tables; the formats of one model and recipe are far apart.

    Nearly all of a cell's time on a GPU is autotuning, of products that most formats share: cells
    that start together tune different ones, and later cells find theirs in the cache.
    """
    ternary = grid(
        base,
        weights=("ternary2", "ternary1.6"),
        recipe=("ours", "seed", "smallest"),
        model=TERNARY,
    )
    plain = grid(base, weights=FORMATS, recipe=("ours", "seed"), model=(*QWEN, "gemma-3-1b"))
    large = grid(
        base,
        recipe=("ours", "seed"),
        model=("gemma-3-4b", "gemma-3-12b"),
        weights=("float16",),
    )
    return [*ternary, *plain, *large]


def environment(cell: Config, platform: str) -> dict[str, str]:
    return device_share(cell, platform)


def prepare(cell: Config) -> None:
    """Compiles a small model's step into the cache, so that no autotuning is in its peak."""
    cached = "JAX_COMPILATION_CACHE_DIR" in os.environ
    if current_platform() == "cuda" and cached and cell.model in SMALL:
        from fabric_jax.training.memory_account import account

        account(memory_config(cell))


def measure(cell: Config) -> dict[str, Any]:
    platform, config = current_platform(), memory_config(cell)
    if platform not in ("cpu", "cuda"):
        return _elsewhere(config, platform)
    from dataclasses import replace

    from fabric_jax.training.memory_account import account

    steps = cell.steps if cell.steps is not None else (3 if platform == "cuda" else 0)
    found = account(replace(config, steps=steps))
    assert found.compiled is not None
    metrics: dict[str, Any] = {
        "kind": "run" if steps else "compiled",
        "analytic_bytes": found.analytic,
        "compiled_bytes": found.compiled.total,
        "compiled_temporary_bytes": found.compiled.temporaries,
        "category_bytes": categories(found.arrays, found.compiled.total),
        "implementation": picked_implementation(config),
        "settings": settings_of(config),
    }
    if found.measured is not None:
        metrics |= {
            "peak_bytes": found.measured.above_baseline,
            "baseline_bytes": found.measured.baseline,
            # The driver counts what others have too.
            "driver_peak_bytes": found.measured.driver_peak if runs_alone() else None,
            "steps": steps,
        }
    return metrics


def categories(arrays: Any, total: int) -> dict[str, int]:
    """A compiled total by what it holds; what is left of it are temporaries."""
    known = {
        "linears": arrays.weights + arrays.scales,
        "embedding and head": arrays.embedding_and_head,
        "norms": arrays.norms,
        "adapters": arrays.adapters,
        "optimizer": arrays.optimizer,
    }
    return known | {"activations and gradients": max(0, total - sum(known.values()))}


def _elsewhere(config: Any, platform: str) -> dict[str, Any]:
    from fabric_jax.measurement.targets import TargetUnavailable, make_program
    from fabric_jax.training.memory_account import analytic_bytes, predict

    built = build(config)
    arrays, scratch = predict(
        built.definition,
        config.optimizer,
        rows=config.batch_size,
        length=config.max_length,
        fused=config.fused_update,
    )
    try:
        program = make_program(built.step, built.abstract_arguments(), platform)
    except TargetUnavailable as reason:
        raise NotOnThisPlatform(str(reason)) from reason
    total = None if program.memory is None else program.memory.total
    return program.metrics() | {
        "analytic_bytes": analytic_bytes(arrays, scratch),
        **({} if total is None else {"category_bytes": categories(arrays, total)}),
        "implementation": picked_implementation(config),
        "settings": settings_of(config),
    }
