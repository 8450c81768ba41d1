"""How fast does a model with random weights generate, and what would memory alone allow?

    fabric-jax sweep experiments.decode_throughput --platform cuda --out DIR batch=1,32
    fabric-jax sweep experiments.decode_throughput --platform cpu --out DIR model=bitnet-125m
    python -m experiments.decode_throughput --model bitnet-1b bitnet-13b --batch 1 32 --out out.json

The sweep has a process a cell: ten to thirty seconds each on a GPU, up to a minute on two cores.
The last command measures all of a model in one process.

Prefill and decode are timed apart, the whole decode loop in one dispatch, and beside them how fast
this machine reads memory: a token of one row can't take less than reading the packed weights, the
head and the filled part of the cache. One JSON line a cell is printed as soon as it is measured; a
cell that the device can't hold is a line with its error.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from fabric_kernels import Packing, cpu_library
from fabric_kernels.large_pages import move_to_large_pages
from fabric_kernels.ternary_matmul import Implementation, select_implementation
from fabric_kernels.ternary_matmul.peaks import make_peaks, pool_threads
from jax import lax

from experiments.job import BITNET
from fabric_jax.errors import FabricError
from fabric_jax.files import require_writable, write_json
from fabric_jax.generation.config import GenerationConfig
from fabric_jax.generation.generator import Generator, bucket, make_generator
from fabric_jax.generation.sampling import sampling_of
from fabric_jax.generation.state import Weights
from fabric_jax.layers.kv_cache import empty_cache
from fabric_jax.measurement.device import device_facts
from fabric_jax.measurement.timing import summarize
from fabric_jax.models.decoder import DecoderDefinition, DecoderOptions, define_decoder
from fabric_jax.models.initialize import Tree, initialize_base
from fabric_jax.models.registry import get_config
from fabric_jax.sweeps import Figure, NotOnThisPlatform, current_platform, grid, own_turn

COLUMNS = (
    *("decode_tokens_per_second", "prefill_tokens_per_second", "first_token_seconds"),
    *("decode_step_seconds", "of_limit", "spread"),
)
FIGURE = Figure(x="model", y="decode_tokens_per_second", series="packing", log="y", kind="bar")
TIMEOUT_SECONDS = 900
READ_SECONDS = 0.2
READ_BYTES = {"cpu": 256 << 20, "gpu": 4 << 30}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One cell.

    Attributes:
        model: registry name.
        batch: rows.
        prompt: tokens of each prompt.
        new: tokens generated after it.
        dtype: of activations.
        table: dtype of embedding and head as they are stored.
        cache: dtype of keys and values; empty for that of the activations.
        packing: of the ternary weights.
        implementation: of the products; empty picks.
        repeats: timed generations, after one that isn't.
    """

    model: str
    batch: int = 1
    prompt: int = 32
    new: int = 256
    dtype: str = "bfloat16"
    table: str = "bfloat16"
    cache: str = ""
    packing: Packing = "ternary2"
    implementation: str = ""
    repeats: int = 3


def definition_of(settings: Settings) -> DecoderDefinition:
    """The decoder of a cell."""
    config = get_config(settings.model)
    options = DecoderOptions(
        mode="packed" if config.ternary else "float",
        dtype=settings.dtype,
        embedding_dtype=settings.table,
        packing=settings.packing,
        implementation=cast(Implementation | None, settings.implementation or None),
    )
    return define_decoder(config, options)


def config() -> Settings:
    return Settings(model="bitnet-1b")


def cells(base: Settings) -> list[Settings]:
    return grid(base, model=(*BITNET, "bitnet-2b-4t"), packing=("ternary2", "ternary1.6"))


def environment(cell: Settings, platform: str) -> dict[str, str]:
    """The share of an 80 GB device: weights, cache, and what reading memory is timed with."""
    if platform != "cuda":
        return {}
    model = get_config(cell.model)
    needed = model.linear_parameters / 4 + model.embedding_parameters * 4
    slots = bucket(cell.prompt + cell.new, model.max_length)
    needed += 4 * cell.batch * slots * model.num_layers * model.num_kv_heads * model.head_dim
    share = (1.2 * needed + 1.5 * READ_BYTES["gpu"] + (1 << 30)) / (78 << 30)
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{min(0.9, share + 0.005):.2f}"}


def measure(cell: Settings) -> dict[str, Any]:
    return measure_as(cell, definition_of(on_this_platform(cell)))


def on_this_platform(cell: Settings) -> Settings:
    """The cell with the activations that are measured here.

    Raises:
        NotOnThisPlatform: there is no device to take times on.
    """
    platform = current_platform()
    if platform not in ("cpu", "cuda"):
        raise NotOnThisPlatform(f"times need a device; this cell is for {platform}")
    return replace(cell, dtype="float32") if platform == "cpu" else cell


def measure_as(cell: Settings, definition: DecoderDefinition) -> dict[str, Any]:
    """The metrics of a cell whose decoder is given."""
    settings = on_this_platform(cell)
    jax.devices()  # starts the device before the turn
    # A single repeat is there to compile.
    with own_turn() if settings.repeats > 1 else nullcontext():
        found = measure_generation(settings, definition, weights_of(definition))
    return {
        "decode_tokens_per_second": found["decode_tokens_per_s"],
        "prefill_tokens_per_second": found["prefill_tokens_per_s"],
        "first_token_seconds": 1e-3 * found["prefill_ms"],
        "decode_step_seconds": 1e-3 * found["decode_ms_a_step"],
        "spread": found["spread"],
        "step_bytes": found["step_bytes"],
        "read_bytes_per_second": 1e9 * found["read_gb_per_s"],
        "of_limit": found["of_limit"],
        "first_call_seconds": found["first_call_s"],
        "implementation": found["runs"],
        "settings": {"dtype": settings.dtype},
    }


def weights_of(definition: DecoderDefinition) -> Tree:
    """Random ones, where ``load_model`` has them."""
    base = initialize_base(definition, 0)
    move_to_large_pages(base)
    return base


def measure_generation(
    settings: Settings, definition: DecoderDefinition, base: Tree
) -> dict[str, Any]:
    """Seconds and rates of one cell, its bytes a decode step, and the limit these set.

    ``of_limit`` is the decode rate as a share of what reading ``step_bytes`` would allow at the
    bandwidth that was measured right after: machines that are shared change from minute to minute.
    """
    generator = make_generator(definition)
    run = _runner(settings, generator, base)
    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    read_rate = bandwidth_meter()
    timed: list[tuple[float, float]] = []
    reads: list[float] = []
    for _ in range(settings.repeats):
        timed.append(run())
        reads.append(read_rate())
    times = np.asarray(timed)
    prefill, decode = (summarize(column.tolist()) for column in times.T)
    tokens = settings.batch * settings.new
    step = step_bytes(settings, definition, base)
    read = float(np.median(reads))
    of_limit = float(np.median(settings.new * step / (times[:, 1] * np.asarray(reads))))
    return {
        **asdict(settings),
        "runs": select_implementation(definition.options.implementation),
        "first_call_s": round(first, 2),
        "prefill_ms": round(1e3 * prefill.median, 3),
        "prefill_tokens_per_s": round(settings.batch * settings.prompt / prefill.median, 1),
        "decode_ms_a_step": round(1e3 * decode.median / settings.new, 4),
        "decode_tokens_per_s": round(tokens / decode.median, 1),
        "spread": round(decode.spread, 3),
        "best_tokens_per_s": round(tokens / decode.fastest, 1),
        "step_bytes": step,
        "read_gb_per_s": round(read / 1e9, 2),
        "limit_tokens_per_s": round(settings.batch * read / step, 1),
        "of_limit": round(of_limit, 3),
    }


def _runner(settings: Settings, generator: Generator, base: Tree) -> Any:
    """One generation: seconds of prefill and of decode."""
    config = generator.config
    random = np.random.default_rng(0)
    shape = (settings.batch, bucket(settings.prompt, config.max_length))
    prompts = jnp.asarray(random.integers(0, config.vocab_size, shape), jnp.int32)
    lengths = jnp.full(settings.batch, settings.prompt, jnp.int32)
    capacity = bucket(settings.prompt + settings.new, config.max_length)
    method, sampling = sampling_of(GenerationConfig(max_new_tokens=settings.new))
    keys = jax.random.split(jax.random.key(0), settings.batch)
    stops, never = jnp.full(8, -1, jnp.int32), jnp.zeros(settings.batch, jnp.bool_)
    weights, starts, limit = Weights(base=base, adapter={}), jnp.zeros_like(lengths), settings.new
    shape = (config.num_layers, settings.batch, capacity, config.num_kv_heads, config.head_dim)

    def run() -> tuple[float, float]:
        cache = jax.block_until_ready(empty_cache(*shape, settings.cache or generator.dtype))
        begin = time.perf_counter()
        state = generator.prefill(
            *(weights, cache, prompts, starts, lengths, None),
            slots=prompts.shape[1],
            log_probs=False,
        )
        jax.block_until_ready(state)
        middle = time.perf_counter()
        state = generator.decode(
            *(weights, state, keys, sampling, stops, jnp.int32(limit), never), method=method
        )
        jax.block_until_ready(state)
        end = time.perf_counter()
        assert int(state.step) == settings.new
        return middle - begin, end - middle

    return run


def step_bytes(settings: Settings, definition: DecoderDefinition, base: Tree) -> int:
    """What one decode step must read: weights, the head once, and the filled slots of the cache."""
    config = definition.config
    tables = {name: base.get(name) for name in ("embedding", "head")}
    head = tables["embedding"] if config.tied_head else tables["head"]
    rest = {name: leaf for name, leaf in base.items() if name not in tables}
    filled = settings.prompt + settings.new / 2
    width = jnp.dtype(settings.cache or settings.dtype).itemsize
    slot = 2 * config.num_kv_heads * config.head_dim * width
    cache = settings.batch * filled * config.num_layers * slot
    return _bytes(rest) + _bytes(head) + int(cache)


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def bandwidth_meter() -> Callable[[], float]:
    """What measures how many bytes of memory are read a second, each time it is asked.

    By the CPU library's loops, elsewhere by a sum on the device.
    """
    if jax.default_backend() == "cpu" and cpu_library.available():
        peaks = make_peaks(pool_threads(), READ_BYTES["cpu"], READ_SECONDS / 4)
        return lambda: peaks.read_bytes(READ_SECONDS)
    count = READ_BYTES.get(jax.default_backend(), 1 << 30) // 4
    array = jnp.ones((64, count // 64), jnp.float32)
    times = 20

    @jax.jit
    def total(array: jax.Array) -> jax.Array:
        # The index keeps the sums apart: equal ones would be computed once.
        def add(i: jax.Array, sums: jax.Array) -> jax.Array:
            return sums + jnp.sum(jnp.maximum(array, i.astype(jnp.float32) * 1e-9), axis=1)

        return lax.fori_loop(0, times, add, jnp.zeros(64, jnp.float32))

    jax.block_until_ready(total(array))

    def rate() -> float:
        seconds: list[float] = []
        for _ in range(3):
            start = time.perf_counter()
            jax.block_until_ready(total(array))
            seconds.append(time.perf_counter() - start)
        return times * array.nbytes / min(seconds)

    return rate


def run(cells: Sequence[Settings]) -> list[dict[str, Any]]:
    """Measures cells one after another, printing each; a model's weights are made once."""
    records: list[dict[str, Any]] = []
    made: tuple[Settings, DecoderDefinition, Tree] | None = None
    for cell in cells:
        try:
            weights = replace(cell, batch=1)
            if made is None or made[0] != weights:
                made = None
                definition = definition_of(cell)
                made = (weights, definition, weights_of(definition))
            record = measure_generation(cell, *made[1:])
        except (FabricError, jax.errors.JaxRuntimeError) as error:
            record = {**asdict(cell), "error": str(error).splitlines()[0][:300]}
        records.append(record)
        print(json.dumps(record), flush=True)
    return records


def main() -> int:
    """Measures all combinations and writes one record where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", nargs="+", required=True)
    parser.add_argument("--batch", nargs="+", type=int, default=[Settings.batch])
    parser.add_argument("--table", nargs="+", default=[Settings.table])
    parser.add_argument("--packing", nargs="+", default=[Settings.packing])
    for name in ("dtype", "cache", "implementation"):
        parser.add_argument(f"--{name}", default=getattr(Settings, name))
    for name in ("prompt", "new", "repeats"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Settings, name))
    parser.add_argument("--out", default="", help="JSON file for all of it")
    given = vars(parser.parse_args())
    out = given.pop("out")
    several = {name: given.pop(name) for name in ("model", "table", "packing", "batch")}
    cells = [
        Settings(model=model, table=table, packing=packing, batch=batch, **given)
        for model in several["model"]
        for table in several["table"]
        for packing in several["packing"]
        for batch in several["batch"]
    ]
    if out:
        require_writable(out)
    records = run(cells)
    if out:
        facts = device_facts().to_dict()
        write_json(out, {"experiment": "decode_throughput", "device": facts, "cells": records})
    return int(any("error" in record for record in records))


if __name__ == "__main__":
    sys.exit(main())
