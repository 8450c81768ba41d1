"""LoRA steps on one device and on several: tokens a second by data, memory a device by fsdp.

Each case runs in a process of its own, so that a device's peak is that of the case. Weights and
rows are random; 16 rows of 512 positions a device, bfloat16 activations, LoRA of rank 16 on every
linear.

    python -m experiments.scaling --devices 2 --output scaling.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np
from flax import nnx

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs every case that fits into the time, or the one that ``--case`` names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=["bitnet-2b-4t", "bitnet-13b"])
    parser.add_argument("--rows", type=int, default=16, help="a device")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--remat", default="linears")
    parser.add_argument("--implementation", default="xla")
    parser.add_argument("--seconds", type=float, default=85.0, help="no case begins after these")
    parser.add_argument("--case", default="", help="model and mesh, as in bitnet-13b:fsdp=2")
    parser.add_argument("--output", default="")
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(words)
    if options.case:
        print(json.dumps(run_case(options)))
        return 0
    record = run_all(options, words)
    print(json.dumps(record, indent=2))
    if options.output:
        write_json(options.output, record)
    return 0 if any("seconds_per_step" in case for case in record["cases"].values()) else 1


def run_all(options: argparse.Namespace, words: list[str]) -> dict[str, Any]:
    """Every case in its own process, the most telling ones first."""
    small, *large = options.models
    many = options.devices
    cases = [f"{small}:data=1", f"{small}:data={many}"]
    cases += [f"{model}:fsdp={many}" for model in large]
    cases += [f"{model}:data={count}" for model in large for count in (1, many)]
    start = time.perf_counter()
    found: dict[str, Any] = {}
    for case in cases:
        if time.perf_counter() - start > options.seconds:
            found[case] = {"left_out": f"{options.seconds:g} seconds had passed"}
            continue
        found[case] = run_process(case, words)
        print(case, json.dumps(found[case]), file=sys.stderr, flush=True)
    scaling = {
        model: found[f"{model}:data={many}"]["tokens_per_second"]
        / found[f"{model}:data=1"]["tokens_per_second"]
        for model in options.models
        if all("tokens_per_second" in found[f"{model}:data={n}"] for n in (1, many))
    }
    return {"devices": many, "scaling_by_data": scaling, "cases": found}


def run_process(case: str, words: list[str]) -> dict[str, Any]:
    """One case in a process of its own; what it printed last if it failed."""
    command = [sys.executable, "-m", "experiments.scaling", *words, "--case", case]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode:
        return {"failed": done.stderr.strip()[-500:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_case(options: argparse.Namespace) -> dict[str, Any]:
    """Compiles from shapes, makes sharded weights, runs steps; everything that is known of them."""
    name, _, text = options.case.partition(":")
    shape = parse_mesh(text, None)
    definition = define(name, options)
    optimizer = make_optimizer(OPTIMIZER, STEPS_OF_SCHEDULE)
    rows = options.rows * shape.row_shards
    batch = random_rows(rows, options.length, definition.config.vocab_size)
    mesh = make_mesh(shape)
    start = time.perf_counter()
    adapter = nnx.to_pure_dict(definition.adapter)
    state = jax.eval_shape(lambda tree: init_state(tree, optimizer), adapter)
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = make_train_step(definition, optimizer, mesh=mesh)
    compiled = step.lower(
        cast(TrainState, abstract_state(state, definition, mesh, "adapter", spread=False)),
        abstract_base(definition, mesh),
        abstract_rows(batch, mesh),
        cast(jax.Array, key),
    ).compile()
    seconds = time.perf_counter() - start
    base = initialize_base(definition, 0, shardings=base_shardings(definition, mesh))
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
        "tokens_per_step": rows * options.length,
        "seconds_per_step": median,
        "seconds_per_step_spread": [min(durations[1:]), max(durations[1:])],
        "tokens_per_second": rows * options.length / median,
        "losses": losses,
        "compile_seconds": seconds,
        "memory": memory(definition, compiled, shape, options),
        "packages": device_facts().packages,
    }


def define(name: str, options: argparse.Namespace) -> DecoderDefinition:
    """The packed model with an adapter of rank 16 on every linear."""
    lora = LoraConfig(rank=16, alpha=32.0)
    return define_decoder(
        get_config(name),
        DecoderOptions(
            dtype="bfloat16",
            remat=options.remat,
            implementation=options.implementation,
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
