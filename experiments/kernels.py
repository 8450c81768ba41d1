"""How close do the packed products come to this machine's limits, over the shapes of all models?

One cell a model and number of rows. On CPU the table is that of ``fabric_kernels``' own benchmark:
quantising product, integers alone and backward product in both packings, beside the measured peaks
of the dot instruction and of reading memory, and XLA's own dots. On a GPU each implementation that
runs there.

    fabric-jax sweep experiments.kernels --platform cpu --out DIR model=bitnet-2b-4t rounds=3
    fabric-jax sweep experiments.kernels --platform cuda --out DIR

Half a minute a cell on two cores; ten seconds on a GPU.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from experiments.job import BITNET, small_share
from fabric_jax.sweeps import Figure, NotOnThisPlatform, current_platform, grid, own_turn

COLUMNS = ("of_dot_peak", "of_read_peak", "times_xla")
FIGURE = Figure(x="rows", y="of_dot_peak", series="model", log="x")
TIMEOUT_SECONDS = 1800


@dataclass(frozen=True, kw_only=True)
class Config:
    """Products of a model's linears.

    Attributes:
        model: whose shapes.
        rows: of the input.
        rounds: how often everything is timed.
    """

    model: str = "bitnet-2b-4t"
    rows: int = 128
    rounds: int = 5


def config() -> Config:
    return Config()


def cells(base: Config) -> list[Config]:
    return grid(base, model=(*BITNET, "bitnet-2b-4t"), rows=(1, 128, 1024))


def environment(cell: Config, platform: str) -> dict[str, str]:
    # The limits take 2.4 GiB, a stack of the largest matrix and its products 2 more.
    return small_share(platform, 0.1)


def measure(cell: Config) -> dict[str, Any]:
    import jax

    platform = current_platform()
    if platform not in ("cpu", "cuda"):
        raise NotOnThisPlatform(f"times need a device; this cell is for {platform}")
    jax.devices()  # starts the device before the turn
    # A single round is there to compile.
    with own_turn() if cell.rounds > 1 else nullcontext():
        return _on_cpu(cell) if platform == "cpu" else _on_gpu(cell)


def _on_cpu(cell: Config) -> dict[str, Any]:
    import numpy as np
    from fabric_kernels import cpu_library
    from fabric_kernels.ternary_matmul import bench
    from fabric_kernels.ternary_matmul.peaks import make_peaks, pool_threads

    if not cpu_library.available():
        raise NotOnThisPlatform(f"no CPU kernels: {cpu_library.status().problem}")
    peaks = make_peaks(pool_threads(), 256 << 20, bench.PEAK_SECONDS)
    lines: list[dict[str, Any]] = []
    for results in bench.run([cell.model], [cell.rows], cell.rounds, peaks):
        lines += [result.record() for result in results]
    linear = [x for x in lines if x["case"] == "linear" and x["packing"] == "ternary2"]
    names = ("of_dot_peak", "of_read_peak", "times_xla")
    metrics = {name: float(np.median([x[name] for x in linear])) for name in names}
    return metrics | {"products": lines, "implementation": "cpu", "isa": cpu_library.load().isa}


def _on_gpu(cell: Config) -> dict[str, Any]:
    import numpy as np
    from fabric_kernels.ternary_matmul.arg_specs import distinct_shapes

    from fabric_jax.measurement.limits import measure_limits

    limits = measure_limits()
    lines: list[dict[str, Any]] = []
    for n, k, _, _ in distinct_shapes([cell.model]):
        for implementation in ("xla", "triton", "mosaic_gpu", "tuned"):
            lines.append(_time_product(n, k, cell, implementation))
    for line in lines:
        if "microseconds" in line:
            rate = 2.0 * cell.rows * line["n"] * line["k"] / (1e-6 * line["microseconds"])
            line["of_dot_peak"] = rate / limits.operations
            packed = line["n"] * line["k"] / 4 / (1e-6 * line["microseconds"])
            line["of_read_peak"] = packed / limits.bytes
    found: dict[str, Any] = {"products": lines, "limit_operation": limits.operation}
    for name in ("of_dot_peak", "of_read_peak"):
        best: dict[tuple[int, int], float] = {}
        for line in lines:
            shape = (line["n"], line["k"])
            best[shape] = max(best.get(shape, 0.0), line.get(name, 0.0))
        found[name] = float(np.median(list(best.values())))
    return found


def _time_product(n: int, k: int, cell: Config, implementation: str) -> dict[str, Any]:
    """A product with each matrix of a stack in turn, so that dispatching isn't what is timed."""
    import jax
    import jax.numpy as jnp
    from fabric_kernels.ternary_matmul.bench_cases import layers_for, make_stack
    from fabric_kernels.ternary_matmul.weight import TernaryWeight

    from fabric_jax.measurement.timing import time_repeated

    chosen: Any = implementation
    layers = max(16, layers_for(n, k, cell.rows, 64))
    stack, scales = make_stack(n, k, layers, "ternary2"), jnp.full((layers,), 0.02, jnp.float32)
    x = jax.random.normal(jax.random.key(0), (cell.rows, k), jnp.bfloat16)

    @jax.jit
    def products(x: jax.Array, stack: jax.Array, scales: jax.Array) -> jax.Array:
        from fabric_kernels.ternary_matmul import ternary_linear

        def one(total: jax.Array, layer: jax.Array) -> tuple[jax.Array, None]:
            weight = TernaryWeight(stack, scales, layer, k, "ternary2")
            return total + ternary_linear(x, (weight,), implementation=chosen)[0], None

        zeros = jnp.zeros((cell.rows, n), x.dtype)
        return jax.lax.scan(one, zeros, jnp.arange(layers))[0]

    line: dict[str, Any] = {"implementation": implementation, "n": n, "k": k, "rows": cell.rows}
    try:
        timing = time_repeated(lambda: products(x, stack, scales), repeats=cell.rounds)
    except Exception as error:  # a shape or device that a kernel refuses is a line of the table
        return line | {"refused": f"{type(error).__name__}: {error}"[:160]}
    microseconds = 1e6 * timing.median / layers
    return line | {"microseconds": microseconds, "spread": timing.spread, "layers": layers}
