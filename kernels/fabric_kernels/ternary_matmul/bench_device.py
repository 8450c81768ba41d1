"""Measures the products on an accelerator beside its own limits and beside XLA's dense dots.

``python -m fabric_kernels.ternary_matmul.bench_device [--model NAME ...] [--shape NxK ...]
[--rows M ...] [--product NAME ...] [--implementation NAME ...] [--packing NAME ...] [--dense]
[--json FILE]``

Limits are measured in the same run: bytes a second of a large copy, operations a second of a large
bfloat16 and a large int8 product. ``fabric_jax.report.roofline`` draws what the JSON file has.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

import jax

from fabric_kernels.packing import Packing
from fabric_kernels.ternary_matmul.arg_specs import MODELS, distinct_shapes
from fabric_kernels.ternary_matmul.device_cases import (
    PRODUCTS,
    DeviceCase,
    Limits,
    Timing,
    device_cases,
    forget_stacks,
    measure_limits,
)
from fabric_kernels.ternary_matmul.device_timing import CompiledTurns
from fabric_kernels.ternary_matmul.select import Implementation

SAMPLES = 5


def device_implementations() -> list[Implementation]:
    """Those that can run on the default device."""
    device = jax.devices()[0]
    if device.platform == "gpu":
        hopper = getattr(device, "compute_capability", "") == "9.0"
        return ["xla", "triton", "mosaic_gpu"] if hopper else ["xla", "triton"]
    return ["xla", "mosaic_tpu"] if device.platform == "tpu" else ["xla"]


def measure(cases: Sequence[DeviceCase], limits: Limits) -> Iterator[Timing | str]:
    """Compiles cases side by side and times them one by one.

    A line of text stands for what an implementation hasn't got.
    """

    def prepare(case: DeviceCase) -> CompiledTurns | str:
        try:
            return case.compile(limits)
        except (NotImplementedError, TypeError, ValueError) as error:
            return f"{case.implementation} {case.product} {case.packing}: {error}"

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for case, compiled in zip(cases, list(pool.map(prepare, cases)), strict=True):
            if isinstance(compiled, str):
                yield compiled
            else:
                yield case.timing(compiled, limits, SAMPLES)


def print_timing(timing: Timing) -> None:
    """One line."""
    print(
        f"{timing.product:18}{timing.implementation:11}{timing.packing:11}"
        f"M {timing.rows:<5} N {timing.n:<6} K {timing.k:<6}{timing.microseconds:9.1f} us "
        f"±{timing.spread:4.0%}  bytes {timing.of_bandwidth:4.0%}  rate {timing.of_rate:4.0%}",
        flush=True,
    )


def measure_all(cases: Sequence[Sequence[DeviceCase]], limits: Limits) -> list[Timing]:
    """Measures and prints."""
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}: "
        f"{limits.bytes_per_second / 1e12:.2f} TB/s, "
        f"bf16 {limits.bf16_per_second / 1e12:.0f} TFLOP/s, "
        f"int8 {limits.int8_per_second / 1e12:.0f} TOP/s"
    )
    found: list[Timing] = []
    for own in cases:
        for result in measure(own, limits):
            if isinstance(result, str):
                print(result, flush=True)
            else:
                print_timing(result)
                found.append(result)
        forget_stacks()
    return found


def write_timings(path: Path, limits: Limits, found: Sequence[Timing]) -> None:
    """JSON: a line of values a product, under one list of columns."""
    device = jax.devices()[0]
    record: dict[str, Any] = {
        "device": device.device_kind,
        "compute_capability": getattr(device, "compute_capability", None),
        "jax": jax.__version__,
        "limits": {name: float(f"{value:.4g}") for name, value in asdict(limits).items()},
        "columns": [field.name for field in fields(Timing)],
    }
    rows = ",\n".join(json.dumps(list(asdict(one).values())) for one in found)
    text = json.dumps(record)[:-1] + f', "timings": [\n{rows}\n]}}\n'
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line a product, and writes the JSON at the end."""
    options = _parse(arguments)
    shapes = options.shape or [(n, k) for n, k, *_ in distinct_shapes(options.model)]
    chosen = options.implementation or device_implementations()
    cases = device_cases(
        shapes,
        options.rows,
        chosen,
        options.packing,
        dense=options.dense,
        products=options.product,
    )
    limits = measure_limits()
    found = measure_all(cases, limits)
    if options.json is not None:
        write_timings(options.json, limits, found)
    return 0


def shape(text: str) -> tuple[int, int]:
    """``NxK``."""
    n, _, k = text.partition("x")
    return int(n), int(k)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fabric_kernels.ternary_matmul.bench_device")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["bitnet-1b"], metavar="NAME")
    parser.add_argument("--shape", nargs="+", type=shape, metavar="NxK", help="in place of models")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 128, 1024, 8192])
    parser.add_argument("--product", nargs="+", choices=PRODUCTS, default=PRODUCTS, metavar="NAME")
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
