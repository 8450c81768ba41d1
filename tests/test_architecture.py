"""Rules that no single module can keep: direction of imports, sizes, nothing local left behind."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path
    for folder in ("kernels", "fabric_jax", "experiments", "tests")
    for path in (ROOT / folder).rglob("*.py")
)
PACKAGE = [path for path in SOURCES if path.relative_to(ROOT).parts[0] != "tests"]

# A room may import those of lower or equal rank; modules never import one another in a circle.
RANKS = {
    "fabric_kernels": 0,
    "fabric_jax.errors": 0,
    "fabric_jax.choices": 0,
    "fabric_jax.files": 1,
    "fabric_jax.gguf_container": 1,
    "fabric_jax.quantization": 1,
    "fabric_jax.parallel": 1,
    "fabric_jax.layers": 2,
    "fabric_jax.models": 3,
    "fabric_jax.data": 4,
    "fabric_jax.checkpoints": 4,
    "fabric_jax.measurement": 4,
    "fabric_jax.generation": 5,
    "fabric_jax.evaluation": 6,
    "fabric_jax.conversion": 7,
    "fabric_jax.training": 7,
    "fabric_jax.sweeps": 7,
    "fabric_jax.report": 8,
    "fabric_jax.model": 8,
    "fabric_jax.quickstart": 8,
    "experiments": 8,
    "fabric_jax": 9,
    "fabric_jax.cli": 9,
}
ORACLES = {"torch", "transformers", "peft", "accelerate"}
LAZY = {
    *("datasets", "grain", "tensorboardX", "tyro", "gguf", "tokenizers", "huggingface_hub"),
    "matplotlib",
}


def module_name(path: Path) -> str:
    """Dotted name of a source file of the package."""
    relative = path.relative_to(ROOT / "kernels" if "kernels" in path.parts else ROOT)
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str | None:
    """The longest known room that ``module`` lies in."""
    parts = module.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in names if name in RANKS), None)


def imported(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, module) of every import; ``from a import b`` also counts as ``a.b``."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            module = node.module or ""
            is_package = (ROOT / module.replace(".", "/")).is_dir()
            names = [f"{module}.{alias.name}" for alias in node.names] if is_package else [module]
            found += [(node.lineno, name) for name in names]
    return found


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def test_imports_go_downwards_only() -> None:
    wrong: list[str] = []
    for path in PACKAGE:
        module = module_name(path)
        own = room(module)
        assert own is not None, f"{module} lies in no known room"
        for line, name in imported(parse(path)):
            other = room(name)
            if other is not None and RANKS[other] > RANKS[own]:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {own} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_no_circle_of_imports() -> None:
    """Among imports at the top of modules; the package's ``__init__`` files are left out."""
    paths = {module_name(p): p for p in PACKAGE if p.name != "__init__.py"}
    graph: dict[str, set[str]] = {}
    for module, path in paths.items():
        top = [n for n in parse(path).body if isinstance(n, ast.Import | ast.ImportFrom)]
        names = [name for node in top for _, name in imported(node)]
        graph[module] = {n for name in names for n in (name, name.rpartition(".")[0]) if n in paths}
    # Raises CycleError, which names the circle.
    list(graphlib.TopologicalSorter(graph).static_order())


def test_kernels_know_jax_alone() -> None:
    allowed = {"jax", "jaxlib", "jaxtyping", "numpy", "fabric_kernels"}
    for path in (ROOT / "kernels").rglob("*.py"):
        for line, name in imported(parse(path)):
            top = name.split(".")[0]
            known = top in allowed or top in sys.stdlib_module_names
            assert known, f"{path.relative_to(ROOT)}:{line}: {name}"


def test_kernels_is_a_folder_and_no_package() -> None:
    """A package of that name would shadow the ``kernels`` library of Hugging Face."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_oracles_are_never_imported_by_the_package() -> None:
    """But by the programs that other implementations are timed with."""
    for path in PACKAGE:
        if path.is_relative_to(ROOT / "experiments" / "peers"):
            continue
        tops = {name.split(".")[0] for _, name in imported(parse(path))}
        assert not tops & ORACLES, path.relative_to(ROOT)


def test_optional_libraries_are_imported_where_they_are_used() -> None:
    for path in PACKAGE:
        for node in parse(path).body:
            for line, name in (
                imported(node) if isinstance(node, ast.Import | ast.ImportFrom) else []
            ):
                where = f"{path.relative_to(ROOT)}:{line}"
                assert name.split(".")[0] not in LAZY, f"{where}: {name} at the top of a module"


@pytest.mark.parametrize("limit", [500])
def test_files_are_short(limit: int) -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for path in SOURCES
        if (count := len(path.read_text().splitlines())) > limit
    }
    assert not long


@pytest.mark.parametrize("limit", [50])
def test_functions_of_the_package_are_short(limit: int) -> None:
    """From the line of ``def`` to the last, the docstring not counted."""
    long: list[str] = []
    for path in PACKAGE:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if ast.get_docstring(node) is not None:
                    text = node.body[0]
                    lines -= (text.end_lineno or text.lineno) - text.lineno + 1
                if lines >= limit:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines}")
    assert not long, "\n".join(long)


def test_tests_mirror_the_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), "two test files share a name"


def tracked_text_files() -> list[Path]:
    """Files of the repository that are text, as git lists them."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        return SOURCES
    binary = {".npz", ".png", ".gguf", ".gz", ".ico"}
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    return [path for path in paths if path.is_file() and path.suffix not in binary]


def test_no_paths_of_one_machine() -> None:
    local = re.compile(r"(?<![\w.~-])/(?:home|root|Users|work|mnt|opt/conda)/\w")
    wrong: list[str] = []
    for path in tracked_text_files():
        if path == Path(__file__).resolve():
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if local.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not wrong, "\n".join(wrong)


def test_no_unfinished_business() -> None:
    marks = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|X" + r"XX)\b")
    wrong = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in SOURCES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if marks.search(line)
    ]
    assert not wrong


def test_choices_are_those_of_the_kernels() -> None:
    from typing import get_args

    from fabric_kernels.ternary_matmul import Implementation

    from fabric_jax.choices import ActQuantChoice, ImplementationChoice
    from fabric_jax.quantization.absmax import ActQuant

    assert get_args(ImplementationChoice) == ("auto", *get_args(Implementation))
    assert get_args(ActQuantChoice) == ("auto", *get_args(ActQuant))
