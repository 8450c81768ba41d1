"""A corpus that every machine has: the source and documentation of Python's standard library.

Documents are the ``.py`` files of the library in the order of their names, without its tests and
without installed packages, and the topics of the language reference that come with ``pydoc``. Which
ones there are depends on the Python version alone, give or take what a distribution leaves out.
"""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from fabric_jax.errors import FabricError

STDLIB = "stdlib"
"""The name of the corpus where a source is asked for."""

LEFT_OUT = frozenset(
    {
        *("site-packages", "dist-packages", "__pycache__", "_bundled", "pydoc_data"),
        *("test", "tests", "idle_test"),
    }
)


def stdlib_files(root: Path | None = None) -> list[Path]:
    """The library's source files, in the order of their paths below ``root``."""
    root = root or Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in root.rglob("*.py")
        if not LEFT_OUT.intersection(path.relative_to(root).parts)
    ]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def stdlib_documents(root: Path | None = None) -> Iterator[tuple[str, str]]:
    """(name, text) of every document; names are paths below ``root`` or ``topic/…``.

    Empty files and files that aren't UTF-8 are passed over.

    Raises:
        FabricError: there is no library, as where it lies in an archive.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    found = False
    for path in stdlib_files(root):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip():
            found = True
            yield path.relative_to(root).as_posix(), text
    if not found:
        raise FabricError(
            f"no source files of Python's standard library in {root}",
            fix="Name other data with --data",
        )
    for name, text in sorted(_topics().items()):
        yield f"topic/{name}", text


def _topics() -> dict[str, str]:
    """The language reference by topics; empty where Python was installed without it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return topics
