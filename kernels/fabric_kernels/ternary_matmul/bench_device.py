"""Measures the products on an accelerator beside its own limits and beside XLA's dense dots.

``python -m fabric_kernels.ternary_matmul.bench_device [--model NAME ...] [--rows M ...]
[--implementation NAME ...] [--dense] [--json FILE]``

Limits are measured in the same run: bytes a second of a large copy, operations a second of a large
bfloat16 and a large int8 product.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fabric_kernels.packing import Packing, packed_width
from fabric_kernels.ternary_matmul.arg_specs import MODELS, distinct_shapes
from fabric_kernels.ternary_matmul.bench_cases import make_stack
from fabric_kernels.ternary_matmul.device_timing import median_seconds
from fabric_kernels.ternary_matmul.select import Implementation, products
from fabric_kernels.ternary_matmul.weight import TernaryWeight

Product = Literal["linear", "linear_transposed"]
UNROLLED = 8
"""Products of a turn, each with an input of its own."""
STACK_BYTES = 256 << 20
"""Packed matrices that a case goes through: more than the caches hold."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the device does at most, measured.

    Attributes:
        bytes_per_second: of device memory, read and written.
        bf16_per_second: operations, multiplications and additions, of a large product.
        int8_per_second: likewise.
    """

    bytes_per_second: float
    bf16_per_second: float
    int8_per_second: float


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One product.

    Attributes:
        product: ``linear`` with its quantiser, or ``linear_transposed``, the backward product.
        implementation: what ran; ``dense-bf16`` and ``dense-int8`` are XLA's dots with unpacked
            matrices and, for int8, quantised rows.
        packing: of the weights; empty for dense ones.
        rows: M.
        n: N.
        k: K.
        microseconds: of one product, the median.
        spread: of the middle half, in parts of the median.
        of_bandwidth: bytes of weights, input and output over time, in parts of the limit.
        of_rate: operations over time, in parts of the limit of int8, or bf16 for what is bf16.
    """

    product: str
    implementation: str
    packing: str
    rows: int
    n: int
    k: int
    microseconds: float
    spread: float
    of_bandwidth: float
    of_rate: float


def measure_limits(samples: int = 5) -> Limits:
    """Takes about a second on a large GPU."""
    size = 8192
    x = jax.random.normal(jax.random.key(0), (2, size, size), jnp.bfloat16)
    codes = jax.random.randint(jax.random.key(1), (2, size, size), -128, 128, jnp.int8)
    wide = jnp.zeros(1 << 28, jnp.float32)
    copy, _ = median_seconds(
        lambda _, a: [a + 1.0], wide, limit_seconds=wide.nbytes / 2e12, samples=samples
    )
    rates: list[float] = []
    for operands, accumulate in ((x, jnp.float32), (codes, jnp.int32)):
        dot = partial(_dense, accumulate=accumulate)
        operations = 2.0 * size**3
        seconds, _ = median_seconds(
            lambda _, a, dot=dot: [dot(a[0], a[1])],
            operands,
            limit_seconds=operations / 1e15,
            samples=samples,
        )
        rates.append(operations / seconds)
    return Limits(
        bytes_per_second=2 * wide.nbytes / copy, bf16_per_second=rates[0], int8_per_second=rates[1]
    )


def packed_timing(
    product: Product,
    implementation: Implementation,
    packing: Packing,
    shape: tuple[int, int, int],
    limits: Limits,
    samples: int = 5,
) -> Timing:
    """Times a product of bfloat16 rows, [M, K] or [M, N], with ``shape`` M, N, K."""
    m, n, k = shape
    weight_bytes = n * packed_width(k, packing)
    layers = int(np.clip(-(-STACK_BYTES // weight_bytes), UNROLLED, 256))
    stack = jnp.asarray(make_stack(n, k, layers, packing))
    scales = jnp.full((layers,), 0.02, jnp.float32)
    run = products(implementation)
    transposed = product == "linear_transposed"

    def turn(index: jax.Array, operands: Any) -> list[jax.Array]:
        rows, stack, scales = operands
        results: list[jax.Array] = []
        for i, x in enumerate(rows):
            layer = (UNROLLED * index + i) % layers
            weight = TernaryWeight(stack, scales, layer, k, packing)
            y = run.linear_transposed([x], [weight]) if transposed else run.linear(x, [weight])[0]
            results.append(y)
        return results

    operands = (_rows(m, n if transposed else k), stack, scales)
    return _timing(turn, operands, product, implementation, packing, shape, limits, samples)


def dense_timing(
    product: Product,
    dtype: Literal["bf16", "int8"],
    shape: tuple[int, int, int],
    limits: Limits,
    samples: int = 5,
) -> Timing:
    """Times XLA's dot with matrices that are not packed, as many as a turn has."""
    m, n, k = shape
    integer, transposed = dtype == "int8", product == "linear_transposed"
    keys = jax.random.split(jax.random.key(2), UNROLLED)
    matrices = [
        jax.random.randint(key, (n, k), -1, 2, jnp.int8).astype(
            jnp.int8 if integer else jnp.bfloat16
        )
        for key in keys
    ]
    rows = _rows(m, n if transposed else k)
    if integer:
        rows = [(x * 30).astype(jnp.int8) for x in rows]

    def turn(_: jax.Array, operands: Any) -> list[jax.Array]:
        rows, matrices = operands
        axis = 0 if transposed else 1
        accumulate = jnp.int32 if integer else jnp.bfloat16
        return [
            _dense(x, w, axis=axis, accumulate=accumulate)
            for x, w in zip(rows, matrices, strict=True)
        ]

    operands = (rows, matrices)
    return _timing(turn, operands, product, f"dense-{dtype}", "", shape, limits, samples)


def _timing(
    turn: Any,
    operands: Any,
    product: Product,
    implementation: str,
    packing: str,
    shape: tuple[int, int, int],
    limits: Limits,
    samples: int,
) -> Timing:
    m, n, k = shape
    bf16 = implementation == "dense-bf16" or product == "linear_transposed"
    rate = limits.bf16_per_second if bf16 else limits.int8_per_second
    bits = {"ternary2": 2.0, "ternary1.6": 1.6}.get(packing, 16.0 if bf16 else 8.0)
    size = n * k * bits / 8 + 2 * m * (n + k)
    at_rate, at_bandwidth = 2.0 * m * n * k / rate, size / limits.bytes_per_second
    seconds, spread = median_seconds(
        turn, operands, limit_seconds=UNROLLED * max(at_rate, at_bandwidth), samples=samples
    )
    each = seconds / UNROLLED
    return Timing(
        product=product,
        implementation=implementation,
        packing=packing,
        rows=m,
        n=n,
        k=k,
        microseconds=round(1e6 * each, 2),
        spread=round(spread, 3),
        of_bandwidth=round(at_bandwidth / each, 3),
        of_rate=round(at_rate / each, 3),
    )


def _rows(m: int, width: int) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(3), UNROLLED)
    return [jax.random.normal(key, (m, width), jnp.bfloat16) for key in keys]


def _dense(x: jax.Array, w: jax.Array, *, accumulate: Any, axis: int = 1) -> jax.Array:
    return lax.dot_general(x, w, (((1,), (axis,)), ((), ())), preferred_element_type=accumulate)


def device_implementations() -> list[Implementation]:
    """Those that can run on the default device."""
    device = jax.devices()[0]
    if device.platform == "gpu":
        hopper = getattr(device, "compute_capability", "") == "9.0"
        return ["xla", "triton", "mosaic_gpu"] if hopper else ["xla", "triton"]
    return ["xla", "mosaic_tpu"] if device.platform == "tpu" else ["xla"]


def run(
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    implementations: Sequence[Implementation],
    packings: Sequence[Packing],
    limits: Limits,
    dense: bool,
) -> Iterator[Timing | str]:
    """The timings of every shape [N, K]; a line of text for what an implementation has not."""
    kinds: tuple[Product, ...] = ("linear", "linear_transposed")
    for n, k in shapes:
        for m in rows:
            for product in kinds:
                for implementation in implementations:
                    for packing in packings:
                        try:
                            yield packed_timing(product, implementation, packing, (m, n, k), limits)
                        except (NotImplementedError, AttributeError, ValueError) as error:
                            yield f"{implementation} {product} {packing}: {error}"
                if dense:
                    yield dense_timing(product, "bf16", (m, n, k), limits)
            if dense:
                yield dense_timing("linear", "int8", (m, n, k), limits)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line a product, and writes the JSON at the end."""
    options = _parse(arguments)
    device = jax.devices()[0]
    limits = measure_limits()
    print(
        f"{device.device_kind}, jax {jax.__version__}: {limits.bytes_per_second / 1e12:.2f} TB/s, "
        f"bf16 {limits.bf16_per_second / 1e12:.0f} TFLOP/s, "
        f"int8 {limits.int8_per_second / 1e12:.0f} TOP/s"
    )
    shapes = options.shape or [(n, k) for n, k, *_ in distinct_shapes(options.model)]
    chosen = options.implementation or device_implementations()
    found: list[Timing] = []
    for result in run(shapes, options.rows, chosen, options.packing, limits, options.dense):
        if isinstance(result, str):
            print(result, flush=True)
            continue
        found.append(result)
        print(
            f"{result.product:18}{result.implementation:11}{result.packing:11}"
            f"M {result.rows:<5} N {result.n:<6} K {result.k:<6}{result.microseconds:9.1f} us "
            f"±{result.spread:4.0%}  bytes {result.of_bandwidth:4.0%}  rate {result.of_rate:4.0%}",
            flush=True,
        )
    if options.json is not None:
        _write(options.json, limits, found)
    return 0


def _write(path: Path, limits: Limits, found: Sequence[Timing]) -> None:
    """Compact: a line of values a product under one list of columns."""
    columns = list(Timing.__dataclass_fields__)
    record = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "limits": {name: float(f"{value:.4g}") for name, value in asdict(limits).items()},
        "columns": columns,
    }
    rows = ",\n".join(json.dumps(list(asdict(one).values())) for one in found)
    text = json.dumps(record)[:-1] + f', "timings": [\n{rows}\n]}}\n'
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _shape(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    return int(n), int(k)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fabric_kernels.ternary_matmul.bench_device")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["bitnet-1b"], metavar="NAME")
    parser.add_argument("--shape", nargs="+", type=_shape, metavar="NxK", help="in place of models")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 128, 1024, 8192])
    parser.add_argument("--implementation", nargs="+", choices=get_args(Implementation))
    parser.add_argument("--packing", nargs="+", choices=get_args(Packing), default=["ternary2"])
    parser.add_argument("--dense", action="store_true", help="XLA's dots with unpacked matrices")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results are written")
    options = parser.parse_args(arguments)
    if min(options.rows) < 1:
        parser.error("--rows takes whole numbers from 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
