"""Which implementation was the fastest on a device, from measured times.

A table is what ``python -m fabric_kernels.tune`` wrote on such a device: every implementation's
time of some products. It is looked for by the name of the device in the folder that
``FABRIC_KERNELS_TUNED`` names, then among those of the package, where a device of the same compute
capability will do as well.
"""

import json
import math
import os
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax

from fabric_kernels.packing import Packing
from fabric_kernels.ternary_matmul.select import Implementation, Product

VARIABLE = "FABRIC_KERNELS_TUNED"
LAUNCH_MICROSECONDS = 2.0
"""What implementations are charged that launch a kernel for each matrix: one matrix is timed, and
layers ask for two or three at a time, which Triton's kernels take together."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The fastest implementation of one product that was measured."""

    product: Product
    packing: Packing
    rows: int
    n: int
    k: int
    implementation: Implementation

    def distance(self, rows: int, n: int, k: int) -> float:
        """How unlike a product of other sizes is: factors between them, rows counting double."""
        factors = 2 * math.log2(max(rows, 1) / self.rows)
        return abs(factors) + abs(math.log2(n * k / (self.n * self.k)))


@dataclass(frozen=True, kw_only=True)
class TunedTable:
    """Choices for a device.

    Attributes:
        device: its name.
        choices: one for each product that was measured.
    """

    device: str
    choices: tuple[Choice, ...]

    def pick(self, product: Product, packing: Packing, rows: int, n: int, k: int) -> Implementation:
        """What was fastest for the most similar product; ``xla`` where none was measured."""
        known = [c for c in self.choices if c.product == product and c.packing == packing]
        if not known:
            return "xla"
        return min(known, key=lambda choice: choice.distance(rows, n, k)).implementation


def table_name(device_kind: str) -> str:
    """The file of a device: ``NVIDIA H100 80GB HBM3`` gives ``nvidia-h100-80gb-hbm3.json``."""
    return re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-") + ".json"


def parse_table(record: dict[str, Any]) -> TunedTable:
    """From what ``bench_device.write_timings`` wrote.

    Raises:
        KeyError, ValueError: it is not such a record.
    """
    columns = {name: i for i, name in enumerate(record["columns"])}
    keys = ("product", "packing", "rows", "n", "k")
    best: dict[tuple[Any, ...], tuple[float, Implementation]] = {}
    for row in record["timings"]:
        if not row[columns["packing"]]:
            continue
        key = tuple(row[columns[name]] for name in keys)
        name: Implementation = row[columns["implementation"]]
        charge = 0.0 if name == "triton" else LAUNCH_MICROSECONDS
        found = (row[columns["microseconds"]] + charge, name)
        best[key] = min(best.get(key, found), found)
    choices = tuple(
        Choice(**dict(zip(keys, key, strict=True)), implementation=implementation)
        for key, (_, implementation) in best.items()
    )
    return TunedTable(device=record["device"], choices=choices)


def device_table() -> TunedTable | None:
    """The table of the default device, if there is one.

    Raises:
        ValueError: a file of that name is no table.
    """
    device = jax.devices()[0]
    if device.platform != "gpu":
        return None
    capability = getattr(device, "compute_capability", None)
    return _find(device.device_kind, capability, os.environ.get(VARIABLE))


@cache
def _find(kind: str, capability: str | None, folder: str | None) -> TunedTable | None:
    name = table_name(kind)
    if folder is not None and (Path(folder) / name).is_file():
        return _read(Path(folder) / name)
    shipped = files("fabric_kernels.ternary_matmul").joinpath("tuned")
    if not shipped.is_dir():
        return None
    tables = {one.name: one for one in shipped.iterdir() if one.name.endswith(".json")}
    if name in tables:
        return _read(tables[name])
    for other in sorted(tables):
        record = json.loads(tables[other].read_text(encoding="utf-8"))
        if capability is not None and record["compute_capability"] == capability:
            return parse_table(record)
    return None


def _read(path: Any) -> TunedTable:
    try:
        return parse_table(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{path} is no table of python -m fabric_kernels.tune ({error}); delete it or run that"
        ) from error
