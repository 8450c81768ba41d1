"""LoRA steps on one device and on several: tokens a second by data, memory a device by fsdp.

Each case runs in a process of its own, so that a device's peak is that of the case, and is stopped
when it takes too long. All cases are compiled first, at once, into a cache; then they run one after
another. Weights and rows are random; 16 rows of 512 positions a device, bfloat16 activations, LoRA
of rank 16 on every linear. The record is written after every case.

    python -m experiments.scaling --devices 2 --output scaling.json

Four minutes at most on two GPUs of a machine with 32 cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from fabric_kernels.ternary_matmul import select_implementation
from flax import nnx
from jax.sharding import Mesh

from fabric_jax.data.batch import Batch
from fabric_jax.files import write_json
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.measurement.categories import compiled_memory
from fabric_jax.measurement.device import device_facts
from fabric_jax.measurement.memory import allocator_stats
from fabric_jax.models.decoder import DecoderDefinition, DecoderOptions, define_decoder
from fabric_jax.models.initialize import initialize_adapter, initialize_base
from fabric_jax.models.on_mesh import abstract_base, base_shardings
from fabric_jax.models.registry import get_config
from fabric_jax.parallel.mesh import MeshShape, make_mesh, parse_mesh
from fabric_jax.parallel.placement import place_rows
from fabric_jax.training.config import OptimizerConfig
from fabric_jax.training.memory_account import analytic_bytes, predict
from fabric_jax.training.on_mesh import abstract_rows, abstract_state, place_state
from fabric_jax.training.optimizer import make_optimizer
from fabric_jax.training.step import TrainState, init_state, make_train_step

OPTIMIZER = OptimizerConfig()
STEPS_OF_SCHEDULE = 100
# Large enough for what is compiled beside others; a case that runs has the device for itself.
COMPILING = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
# Of a pool the allocator counts what was asked for, without one blocks of up to twice the size.
RUNNING = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs every case that fits into the time, or the one that ``--case`` names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=["bitnet-2b-4t", "bitnet-13b"])
    parser.add_argument("--rows", type=int, default=16, help="a device")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--remat", default="linears")
    parser.add_argument("--implementation", default="auto", help="auto: what the device chooses")
    parser.add_argument("--seconds", type=float, default=225.0, help="of all cases")
    parser.add_argument("--case-seconds", type=float, default=75.0, help="of each, at most")
    parser.add_argument("--case", default="", help="model and mesh, as in bitnet-13b:fsdp=2")
    parser.add_argument("--compile-only", action="store_true", help="of --case")
    parser.add_argument("--output", default="")
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(words)
    if options.case:
        print(json.dumps(run_case(options)))
        return 0
    record = run_all(options, words)
    print(json.dumps(record, indent=2))
    return 0 if any("seconds_per_step" in case for case in record["cases"].values()) else 1


def run_all(options: argparse.Namespace, words: list[str]) -> dict[str, Any]:
    """Every case in its own process, the most telling ones first."""
    small, *large = options.models
    many, end = options.devices, time.perf_counter() + options.seconds
    cases = [f"{small}:data=1", f"{small}:data={many}"]
    cases += [f"{model}:fsdp={many}" for model in large]
    cases += [f"{model}:data={count}" for model in large for count in (1, many)]
    shown = [word for word in words if word not in ("--output", options.output)]
    record: dict[str, Any] = {"command": " ".join(["python -m experiments.scaling", *shown])}
    record |= {"devices": many, "scaling_by_data": {}, "cases": {}}
    with tempfile.TemporaryDirectory() as cache:
        compiled = compile_all(cases, words, cache, options.case_seconds)
        for case in cases:
            left = min(options.case_seconds, end - time.perf_counter())
            found: dict[str, Any] = {"left_out": f"{options.seconds:g} seconds had passed"}
            if left > 0:
                found = run_process(case, words, environment(RUNNING, cache), left)
            record["cases"][case] = found | compiled.get(case, {})
            record["scaling_by_data"] = scaling(record["cases"], options)
            print(case, json.dumps(found), file=sys.stderr, flush=True)
            if options.output:
                write_json(options.output, record)
    return record


def scaling(cases: Mapping[str, dict[str, Any]], options: argparse.Namespace) -> dict[str, float]:
    """Tokens a second on all devices, by those on one."""
    found: dict[str, float] = {}
    for model in options.models:
        one, all_of_them = (
            cases.get(f"{model}:data={count}", {}).get("tokens_per_second")
            for count in (1, options.devices)
        )
        if one and all_of_them:
            found[model] = all_of_them / one
    return found


def environment(chosen: dict[str, str], cache: str) -> dict[str, str]:
    """Of a case's process: ours, its allocator's and the folder of compiled programs."""
    shared = {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return dict(os.environ) | shared | chosen


def compile_all(
    cases: Sequence[str], words: list[str], cache: str, seconds: float
) -> dict[str, dict[str, Any]]:
    """Compiles every case into ``cache``, all at once; what each took, if it came to an end."""
    end = time.perf_counter() + seconds
    started: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}
    for number, case in enumerate(cases):
        output = Path(cache) / f"case-{number}.out"
        with output.open("wb") as file:
            process = subprocess.Popen(
                command_of(case, [*words, "--compile-only"]),
                stdout=file,
                stderr=subprocess.DEVNULL,
                env=environment(COMPILING, cache),
            )
        started[case] = process, output
    found: dict[str, dict[str, Any]] = {}
    for case, (process, output) in started.items():
        try:
            process.wait(max(0.1, end - time.perf_counter()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.returncode == 0:
            found[case] = json.loads(output.read_text().strip().splitlines()[-1])
        print(f"compiled {case}: {found.get(case)}", file=sys.stderr, flush=True)
    return found


def command_of(case: str, words: list[str]) -> list[str]:
    """The command of one case's process."""
    return [sys.executable, "-m", "experiments.scaling", *words, "--case", case]


def run_process(
    case: str, words: list[str], variables: dict[str, str], seconds: float
) -> dict[str, Any]:
    """One case in a process of its own; what it printed last if it failed."""
    try:
        done = subprocess.run(
            command_of(case, words),
            capture_output=True,
            text=True,
            check=False,
            env=variables,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"stopped after {seconds:.0f} seconds"}
    if done.returncode:
        return {"failed": done.stderr.strip()[-500:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_case(options: argparse.Namespace) -> dict[str, Any]:
    """Compiles from shapes, makes sharded weights, runs steps; everything that is known of them."""
    name, _, text = options.case.partition(":")
    shape = parse_mesh(text, None)
    definition = define(name, options)
    rows = options.rows * shape.row_shards
    batch = random_rows(rows, options.length, definition.config.vocab_size)
    mesh = make_mesh(shape)
    start = time.perf_counter()
    compiled = compile_step(definition, batch, mesh)
    if options.compile_only:
        return {"compile_seconds": time.perf_counter() - start}
    base = initialize_base(definition, 0, shardings=base_shardings(definition, mesh))
    optimizer = make_optimizer(OPTIMIZER, STEPS_OF_SCHEDULE)
    fresh = init_state(initialize_adapter(definition, 0), optimizer)
    running = place_state(fresh, definition, mesh, "adapter", spread=False)
    placed = place_rows(batch, rows, mesh)
    durations: list[float] = []
    losses: list[float] = []
    for _ in range(options.steps + 1):
        begin = time.perf_counter()
        running, metrics = compiled(running, base, placed, jax.random.key(0))
        losses.append(float(metrics.loss))
        durations.append(time.perf_counter() - begin)
    median = statistics.median(durations[1:])
    return {
        "device": jax.devices()[0].device_kind,
        "implementation": select_implementation(implementation_of(options)),
        "tokens_per_step": rows * options.length,
        "seconds_per_step": median,
        "seconds_per_step_spread": [min(durations[1:]), max(durations[1:])],
        "tokens_per_second": rows * options.length / median,
        "losses": losses,
        "memory": memory(definition, compiled, shape, options),
        "packages": device_facts().packages,
    }


def compile_step(definition: DecoderDefinition, batch: Batch, mesh: Mesh) -> jax.stages.Compiled:
    """The step on a mesh, from shapes alone."""
    optimizer = make_optimizer(OPTIMIZER, STEPS_OF_SCHEDULE)
    adapter = nnx.to_pure_dict(definition.adapter)
    state = jax.eval_shape(lambda tree: init_state(tree, optimizer), adapter)
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = make_train_step(definition, optimizer, mesh=mesh)
    return step.lower(
        cast(TrainState, abstract_state(state, definition, mesh, "adapter", spread=False)),
        abstract_base(definition, mesh),
        abstract_rows(batch, mesh),
        cast(jax.Array, key),
    ).compile()


def implementation_of(options: argparse.Namespace) -> Any:
    """Of the packed products; None for auto, which picks."""
    return None if options.implementation == "auto" else options.implementation


def define(name: str, options: argparse.Namespace) -> DecoderDefinition:
    """The packed model with an adapter of rank 16 on every linear."""
    lora = LoraConfig(rank=16, alpha=32.0)
    return define_decoder(
        get_config(name),
        DecoderOptions(
            dtype="bfloat16",
            remat=options.remat,
            implementation=implementation_of(options),
            lora=lora,
        ),
    )


def memory(
    definition: DecoderDefinition,
    compiled: jax.stages.Compiled,
    shape: MeshShape,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Bytes a device: by dimensions, as compiled, and each device's own peak.

    Random weights are made on the first device, a leaf at a time, so its peak may be that of their
    making; the others' is that of the step.
    """
    arrays, scratch = predict(
        definition,
        OPTIMIZER,
        rows=options.rows * shape.row_shards,
        length=options.length,
        fused=False,
        mesh=shape,
    )
    plan = compiled_memory(compiled)
    stats = [allocator_stats(device) for device in jax.devices()[: shape.devices]]
    return {
        "analytic": analytic_bytes(arrays, scratch),
        "analytic_base": arrays.base,
        "analytic_linears": arrays.weights,
        "compiled": plan.total,
        "compiled_temporaries": plan.temporaries,
        "peaks": [one["peak_bytes_in_use"] for one in stats if one is not None],
    }


def random_rows(rows: int, length: int, vocabulary: int) -> Batch:
    """One micro-batch [1, B, T] of full rows, one document each."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocabulary, (1, rows, length + 1)).astype(np.int32)
    ones = np.ones((1, rows, length), np.int32)
    fields: Any = {
        "tokens": tokens[..., :-1],
        "targets": tokens[..., 1:],
        "loss_mask": ones.astype(np.float32),
        "segment_ids": ones,
        "positions": ones * np.arange(length, dtype=np.int32),
    }
    return Batch(**fields)


if __name__ == "__main__":
    sys.exit(main())
