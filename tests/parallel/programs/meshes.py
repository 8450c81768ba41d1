"""Twenty steps on meshes of eight virtual CPU devices, against those of one device.

Run as a process with the meshes as arguments: the number of devices is fixed for a process. Prints
one JSON object.

BitNet's rounding to int8 makes free-running losses chaotic: one activation that rounds the other
way, because a sum was taken in another order, moves thousands of others a layer further on. So each
step on a mesh starts from the state that one device had, and with the quantiser off, where nothing
is amplified, the runs are free.
"""

import json
import re
import sys
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from fabric_jax.data.batch import Batch
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.decoder import DecoderDefinition, DecoderOptions, define_decoder
from fabric_jax.models.initialize import initialize_adapter, initialize_base
from fabric_jax.models.on_mesh import place_base
from fabric_jax.models.registry import get_config
from fabric_jax.parallel.mesh import MeshShape, make_mesh, parse_mesh
from fabric_jax.parallel.placement import base_specs, bytes_on_device, place_rows
from fabric_jax.training.config import OptimizerConfig
from fabric_jax.training.on_mesh import place_state
from fabric_jax.training.optimizer import make_optimizer
from fabric_jax.training.step import TrainState, init_state, make_train_step

ROWS, LENGTH, STEPS = 8, 32, 20
MODEL = replace(
    get_config("bitnet-tiny"),
    name="mesh",
    vocab_size=64,
    num_layers=2,
    hidden_size=64,
    ffn_size=128,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    max_length=LENGTH,
)
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-3), STEPS)
KEY = jax.random.key(7)
SETTINGS: dict[str, dict[str, Any]] = {
    "xla": {"implementation": "xla"},
    "cpu": {"implementation": "cpu", "gradient_bits": 24},
    "1.6": {"implementation": "xla", "packing": "ternary1.6", "remat": "int8-residuals"},
    "float": {"implementation": "xla", "act_quant": "none", "remat": "none"},
    "master": {"mode": "master", "act_quant": "none"},
}


def define(setting: str) -> DecoderDefinition:
    lora = LoraConfig(rank=4, dropout=0.1)
    options: dict[str, Any] = {"remat": "linears"} | SETTINGS[setting]
    return define_decoder(MODEL, DecoderOptions(lora=lora, **options))


def base_of(definition: DecoderDefinition) -> Any:
    """Random weights, with the outputs of attention and feed-forward scaled down."""
    base = initialize_base(definition, 0)
    for part, name in (("attention", "o"), ("mlp", "down")):
        linear = base["layers"][part][name]
        key = "scale" if "scale" in linear else "weight"
        linear[key] = linear[key] * 0.01
    return base


def batch(step: int) -> Batch:
    """One micro-batch of random rows, some of them short."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, MODEL.vocab_size, (1, ROWS, LENGTH + 1)).astype(np.int32)
    filled = np.arange(LENGTH) < rng.integers(LENGTH // 2, LENGTH + 1, (1, ROWS, 1))
    fields: Any = {
        "tokens": tokens[..., :-1],
        "targets": tokens[..., 1:],
        "loss_mask": filled.astype(np.float32),
        "segment_ids": filled.astype(np.int32),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), filled.shape),
    }
    return Batch(**fields)


def alone(definition: DecoderDefinition) -> tuple[list[Any], list[float]]:
    """The state before each step on one device, as numpy arrays, and its loss."""
    step = make_train_step(definition, OPTIMIZER)
    base = base_of(definition)
    state = init_state(initialize_adapter(definition, 0), OPTIMIZER)
    states, losses = [], []
    for number in range(STEPS):
        states.append(jax.tree.map(np.array, state))
        state, metrics = step(state, base, batch(number), KEY)
        losses.append(float(metrics.loss))
    return [*states, jax.tree.map(np.array, state)], losses


def on_mesh(
    definition: DecoderDefinition, shape: MeshShape, states: list[Any], losses: list[float]
) -> dict[str, Any]:
    """How far the steps on a mesh are from those of one device, and what the program gathers."""
    mesh = make_mesh(shape)
    base = place_base(base_of(definition), definition, mesh)
    specs = base_specs(base, shape, ternary=True)
    spread = shape.fsdp > 1

    def placed(state: Any) -> TrainState:
        return place_state(state, definition, mesh, "adapter", spread=spread)

    step = make_train_step(definition, OPTIMIZER, mesh=mesh, spread=spread)
    rows = [place_rows(batch(number), ROWS, mesh) for number in range(STEPS)]
    compiled = step.lower(placed(states[0]), base, rows[0], KEY).compile()
    free = definition.options.act_quant == "none"
    state, loss_errors, state_errors = placed(states[0]), [], []
    for number in range(STEPS):
        before = state if free else placed(states[number])
        state, metrics = compiled(before, base, rows[number], KEY)
        loss_errors.append(abs(float(metrics.loss) - losses[number]))
        state_errors.append(distance(state.params, states[number + 1].params))
    linears = {
        f"{part}.{name}": leaf["weight"]
        for part in ("attention", "mlp")
        for name, leaf in base["layers"][part].items()
        if "weight" in leaf
    }
    return {
        "loss": max(loss_errors),
        "params": max(state_errors),
        "parts": {
            name: [weight.nbytes, *{shard.data.nbytes for shard in weight.addressable_shards}]
            for name, weight in linears.items()
        },
        "bytes_on_device": bytes_on_device(base, specs, shape),
        "bytes_held": held_bytes(base),
        "layer_bytes": sum(w.nbytes for w in linears.values()) // MODEL.num_layers,
        "gathered": gathered_bytes(compiled.as_text() or ""),
        "aliased": bool(re.search(r"input_output_alias", compiled.as_text() or "")),
    }


def held_bytes(tree: Any) -> list[int]:
    """Different sums of what devices hold of a tree."""
    sums = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            sums[shard.device] += shard.data.nbytes
    return sorted(set(sums.values()))


def distance(found: Any, expected: Any) -> float:
    """The largest difference of any two elements, in learning rates."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.max(np.abs(np.asarray(a) - b))) for a, b in pairs) / 1e-3


def gathered_bytes(program: str) -> list[int]:
    """Bytes of packed weights that each computation of a compiled program gathers."""
    found: list[int] = []
    for computation in re.split(r"\n(?=%|ENTRY)", program):
        results = re.findall(r"= u8\[([\d,]+)\]\S* all-gather(?:-start)?\(", computation)
        tuples = re.findall(r"= \(.*?u8\[([\d,]+)\]\S*\) all-gather-start\(", computation)
        sizes = [int(np.prod([int(n) for n in dims.split(",")])) for dims in results + tuples]
        if sizes:
            found.append(sum(sizes))
    return found


def main() -> None:
    settings, *meshes = sys.argv[1:]
    found: dict[str, dict[str, Any]] = {}
    for setting in settings.split(","):
        definition = define(setting)
        states, losses = alone(definition)
        found[setting] = {
            text: on_mesh(definition, parse_mesh(text, 8), states, losses) for text in meshes
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
