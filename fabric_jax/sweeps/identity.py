"""Digests: what a record is of, and which sources made it."""

import hashlib
import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fabric_jax.sweeps.records import SCHEMA

LENGTH = 16
# Running, printing and reporting change no number.
SILENT = ("cli", "sweeps", "report")


def cell_digest(experiment: str, platform: str, cell: dict[str, Any]) -> str:
    """Of everything that decides what a cell measures, the code left out."""
    identity = {"schema": SCHEMA, "experiment": experiment, "platform": platform, "cell": cell}
    return _digest(json.dumps(identity, sort_keys=True).encode())


def code_digest(module: str) -> str:
    """Of the experiment's source and of all sources of the package and the kernels."""
    spec = find_spec(module)
    own = Path(spec.origin).read_bytes() if spec and spec.origin else b""
    return _digest(own + _package().encode())


@cache
def _package() -> str:
    total = hashlib.sha256()
    for path in _sources():
        total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def _sources() -> list[Path]:
    roots = [Path(__file__).resolve().parents[1]]
    kernels = find_spec("fabric_kernels")
    if kernels is not None and kernels.origin is not None:
        roots.append(Path(kernels.origin).resolve().parent)
    found: list[Path] = []
    for root in roots:
        for suffix in ("*.py", "*.h", "*.cpp"):
            found += [
                path for path in root.rglob(suffix) if path.relative_to(root).parts[0] not in SILENT
            ]
    return sorted(found)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:LENGTH]
