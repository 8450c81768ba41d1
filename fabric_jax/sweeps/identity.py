"""Digests: what a record is of, and which sources made it."""

import ast
import hashlib
import json
from collections.abc import Iterator
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
    """Of the experiment's sources and of all sources of the package and the kernels."""
    own = b"".join(path.read_bytes() for path in own_sources(module))
    return _digest(own + _package().encode())


def own_sources(module: str) -> list[Path]:
    """A module's file and those it imports, at any depth, from its package or from beside it."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        return []
    start = Path(spec.origin).resolve()
    is_package = start.name == "__init__.py"
    home = start.parents[module.count(".") + is_package]
    found: dict[Path, None] = {}
    left = [start]
    while left:
        path = left.pop()
        if path not in found:
            found[path] = None
            left += _imported(path, home, module.split(".")[0])
    return [start, *sorted(found.keys() - {start})]


def _imported(path: Path, home: Path, top: str) -> Iterator[Path]:
    """Files of the modules that a source names in imports: of package ``top``, or single ones."""
    parts = path.relative_to(home).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_bytes())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = parts[: len(parts) - node.level] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in names:
            first, *rest = name.split(".")
            file = home.joinpath(first, *rest).with_suffix(".py")
            if file.is_file() and (first == top or not rest):
                yield file


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
        # JSON: the tables of measured times, by which kernels are chosen.
        for suffix in ("*.py", "*.h", "*.cpp", "*.json"):
            found += [
                path for path in root.rglob(suffix) if path.relative_to(root).parts[0] not in SILENT
            ]
    return sorted(found)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:LENGTH]
