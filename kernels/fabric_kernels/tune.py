"""Measures which implementation of each product is the fastest on this machine's accelerator.

``python -m fabric_kernels.tune --out FOLDER [--quick]`` writes FOLDER/<device>.json; programs read
it where ``FABRIC_KERNELS_TUNED`` names that folder. Takes two to ten minutes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from fabric_kernels.packing import Packing
from fabric_kernels.ternary_matmul.bench_device import (
    device_implementations,
    measure_all,
    shape,
    write_timings,
)
from fabric_kernels.ternary_matmul.device_cases import device_cases, measure_limits
from fabric_kernels.ternary_matmul.tuned_table import table_name

SHAPES = ((768, 768), (2048, 2048), (6912, 2560), (13824, 5120))
"""[N, K] from small to large; choices for others are those of the nearest."""
ROWS = (1, 2, 4, 8, 16, 64, 128, 512, 1024, 4096, 8192)
QUICK_ROWS = (1, 8, 128, 1024, 8192)
PACKINGS: tuple[Packing, ...] = ("ternary2", "ternary1.6")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(prog="python -m fabric_kernels.tune")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="two shapes, five numbers of rows")
    parser.add_argument("--rows", nargs="+", type=int, metavar="M")
    parser.add_argument("--shape", nargs="+", type=shape, metavar="NxK")
    options = parser.parse_args(arguments)
    device = jax.devices()[0]
    implementations = device_implementations()
    if len(implementations) == 1:
        print(
            f"{device.device_kind} has one implementation, {implementations[0]}: nothing to choose",
            file=sys.stderr,
        )
        return 2
    if not options.out.is_dir():
        parser.error(f"--out is a folder that exists, found {options.out}")
    shapes = options.shape or (SHAPES[1:3] if options.quick else SHAPES)
    rows = options.rows or (QUICK_ROWS if options.quick else ROWS)
    limits = measure_limits()
    found = measure_all(device_cases(shapes, rows, implementations, PACKINGS, dense=False), limits)
    path = options.out / table_name(device.device_kind)
    write_timings(path, limits, found)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
