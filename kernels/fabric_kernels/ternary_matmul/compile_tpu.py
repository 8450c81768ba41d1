r"""Compiles the TPU kernels without a TPU, and writes what the compiler says about them.

``pip install 'jax[tpu]'`` into an environment of its own, then::

    JAX_PLATFORMS=cpu python -m fabric_kernels.ternary_matmul.compile_tpu \
        --target v5e v6e --out FILE

libtpu compiles for a described chip; nothing runs. A kernel's *bundles* are its instructions, one a
cycle, for a grid step (prologue of the pipeline included, waiting for memory not): a proxy of time.
"""

import argparse
import importlib.util
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Sharding, SingleDeviceSharding

from fabric_kernels.packing import Packing, packed_width
from fabric_kernels.ternary_matmul import mosaic_tpu
from fabric_kernels.ternary_matmul.arg_specs import MODELS, distinct_shapes
from fabric_kernels.ternary_matmul.mosaic_tpu import Target
from fabric_kernels.ternary_matmul.weight import TernaryWeight

# Whole hosts: there is no topology of one chip. The first chip's program is compiled.
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
ROWS = (8, 128, 1024)
LAYERS = 2
COLUMNS = ["n", "k", "m", "call", "argument_bytes", "temporary_bytes", "seconds", "bundles"]


def available() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def describe(target: str) -> Sharding:
    """Where a program for one ``target`` chip lies."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # The lock keeps two processes from one chip; there is none here.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies  # not every platform's jaxlib can describe chips

    described = topologies.get_topology_desc(TOPOLOGIES[target], platform="tpu")
    return SingleDeviceSharding(described.devices[0])


def compile_call(
    call: str, n: int, k: int, m: int, target: str, place: Sharding, packing: Packing = "ternary2"
) -> Any:
    """Compiles ``linear`` or ``transposed`` of bfloat16 [m, ...] by a layer of a stack."""
    chip = Target(int8=target != "tpu7x")

    def run(x: jax.Array, packed: jax.Array, scales: jax.Array, layer: jax.Array) -> jax.Array:
        weight = TernaryWeight(packed, scales, layer, k, packing)
        if call == "linear":
            return mosaic_tpu.linear(x, (weight,), target=chip)[0]
        return mosaic_tpu.linear_transposed((x,), (weight,), target=chip)

    def operand(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    lowered = jax.jit(run).lower(
        operand((m, k if call == "linear" else n), jnp.bfloat16),
        operand((LAYERS, n, packed_width(k, packing)), jnp.uint8),
        operand((LAYERS,), jnp.float32),
        operand((), jnp.int32),
    )
    return lowered.compile()


def count_bundles(dump: Path) -> dict[str, int]:
    """Bundles of each of our kernels that was compiled since the last time, by name."""
    counts: dict[str, int] = {}
    for file in dump.iterdir():
        name = re.search(r"-ternary_([a-z]+)\S*-\d+-final_bundles\.txt$", file.name)
        if name is not None and "schedule-analysis" not in file.name:
            text = file.read_text(encoding="utf-8", errors="replace")
            counts[name[1]] = len(re.findall(r"^\s*0x[0-9a-f]+", text, re.MULTILINE))
        file.unlink()
    return counts


def measure(
    call: str,
    shape: tuple[int, int, int],
    target: str,
    place: Sharding,
    packing: Packing,
    dump: Path,
) -> list[Any]:
    """One row of the table: ``COLUMNS``; ``bundles`` is the error where nothing came out."""
    start = time.perf_counter()
    try:
        compiled = compile_call(call, *shape, target, place, packing)
    except Exception as error:  # whatever the compiler raises is a result here
        count_bundles(dump)
        return [*shape, call, None, None, None, f"{error}"[:200]]
    seconds = round(time.perf_counter() - start, 1)
    memory = compiled.memory_analysis()
    sizes = [memory.argument_size_in_bytes, memory.temp_size_in_bytes]
    return [*shape, call, *sizes, seconds, count_bundles(dump)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles every call and writes the JSON; 1 where any did not compile."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", nargs="+", choices=list(TOPOLOGIES), default=["v5e"])
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--packing", choices=get_args(Packing), default="ternary2")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if not available():
        print("libtpu is not installed. Run pip install 'jax[tpu]'.", file=sys.stderr)
        return 1
    jax.config.update("jax_platforms", "cpu")
    tables: dict[str, list[list[Any]]] = {}
    with tempfile.TemporaryDirectory() as dump:
        flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()
        for target in options.target:
            place, table = describe(target), tables.setdefault(target, [])
            for n, k, _, _ in distinct_shapes(options.model):
                for m in options.rows:
                    for call in ("linear", "transposed"):
                        shape = (n, k, m)
                        table.append(
                            measure(call, shape, target, place, options.packing, Path(dump))
                        )
                        print(target, *table[-1], flush=True)
    _write(options.out, options.packing, tables)
    return int(any(row[4] is None for table in tables.values() for row in table))


def _write(out: Path, packing: str, tables: dict[str, list[list[Any]]]) -> None:
    """A line for each row of the tables."""
    about = {"jax": jax.__version__, "libtpu": version("libtpu"), "packing": packing}
    about |= {"layers": LAYERS, "dtype": "bfloat16", "columns": COLUMNS}
    lines = [json.dumps(about, separators=(",", ":"))[:-1]]
    for target, table in tables.items():
        rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in table)
        lines.append(f',\n"{target}":[\n{rows}]')
    out.write_text("".join(lines) + "}\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
