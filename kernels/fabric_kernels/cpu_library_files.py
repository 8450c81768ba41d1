"""Where the compiled CPU kernels lie: shipped with the package, or built into the user's cache."""

import hashlib
import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fabric_kernels import build_cpu_library as builder
from fabric_kernels.build_cpu_library import BuildError, Compiler, Headers, Record

Origin = Literal["shipped", "built"]
SHIPPED = Path(__file__).with_name("lib") / "fabric_kernels_cpu.so"
WRITABLE_CACHE = "Set FABRIC_KERNELS_CACHE to a folder that can be written"

_log = logging.getLogger("fabric_kernels")


@dataclass(frozen=True, kw_only=True)
class LibraryFile:
    """A library that fits this process.

    Attributes:
        path: its file.
        origin: ``shipped`` inside the package, or ``built`` on this machine.
        record: what it was made from.
    """

    path: Path
    origin: Origin
    record: Record


def find_shipped(library: Path = SHIPPED, sources: Path = builder.SOURCES) -> LibraryFile | str:
    """The library inside the package, or why it doesn't fit (empty: there is none to consider).

    XLA takes calls compiled against an older minor version of its interface and the same major one.
    A library with a newer minor version would stop the whole CPU backend when that starts.

    Raises:
        BuildError: jaxlib's headers, which tell its version of the interface, are missing, or
            FABRIC_KERNELS_CXXFLAGS is malformed.
    """
    if not library.exists() or builder.extra_flags():
        return ""
    record = builder.read_record(library)
    if record is None:
        return "the library of the package is damaged"
    if record.machine != builder.machine():
        return f"the library of the package is for {record.machine}"
    if record.sources != builder.source_digest(sources):
        return "the library of the package was compiled from other sources"
    major, minor = builder.find_headers().api_version
    if record.api_major != major or record.api_minor > minor:
        return (
            f"the library of the package needs version {record.api_major}.{record.api_minor} of "
            f"XLA's foreign function interface; this jaxlib has {major}.{minor}"
        )
    return LibraryFile(path=library, origin="shipped", record=record)


def find_or_build(sources: Path = builder.SOURCES) -> LibraryFile:
    """The library in the cache, compiled first if there is none.

    Its name holds a digest of sources, flags, jaxlib's headers, machine and compiler: whatever
    changes, another file is used. Any number of processes may call this at once; one compiles, the
    others wait for it. Without a compiler a library that was made of the same by any is used.

    Raises:
        BuildError: there is none and none can be built.
    """
    if os.name != "posix":
        raise BuildError("the CPU kernels exist for Linux and macOS only", "Use one of these")
    headers = builder.find_headers()
    folder = cache_folder()
    start = f"fabric_kernels_cpu-{_ingredients(headers, sources)}"
    try:
        compiler = builder.find_compiler()
    except BuildError:
        for path in sorted(folder.glob(f"{start}-*.so")):
            if record := builder.read_record(path):
                return LibraryFile(path=path, origin="built", record=record)
        raise
    target = folder / f"{start}-{_short(' '.join(compiler.command), compiler.banner)}.so"
    record = builder.read_record(target)
    if record is None:
        record = _build_once(target, compiler, headers, sources)
    return LibraryFile(path=target, origin="built", record=record)


def cache_folder() -> Path:
    """FABRIC_KERNELS_CACHE, or ``fabric_jax`` in XDG_CACHE_HOME or ``~/.cache``.

    Raises:
        BuildError: none of these is known.
    """
    own = os.environ.get("FABRIC_KERNELS_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME", "")
    try:
        if own:
            return Path(own).expanduser().absolute()
        # The specification says to take no notice of relative paths.
        base = Path(shared) if Path(shared).is_absolute() else Path.home() / ".cache"
    except RuntimeError as error:
        raise BuildError(f"there is no cache folder: {error}", WRITABLE_CACHE) from error
    return base / "fabric_jax"


def _build_once(target: Path, compiler: Compiler, headers: Headers, sources: Path) -> Record:
    log = builder.log_path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        before = _changed(log)
        with _lock(target.with_suffix(".lock")):
            record = builder.read_record(target)
            if record is not None:
                return record
            # Not by the clock, which may have been another one when the log was written.
            if _changed(log) not in (None, before):
                raise BuildError(
                    f"another process has just failed to compile them (what the compiler said is "
                    f"in {log})",
                    builder.OTHER_COMPILER,
                )
            _log.warning(
                "Compiling the CPU kernels with %s, once, in up to a minute (log: %s).",
                compiler.command[0],
                log,
            )
            return builder.build(target, compiler, headers, sources)
    except OSError as error:
        problem = f"the cache folder {target.parent} cannot be written: {error}"
        raise BuildError(problem, WRITABLE_CACHE) from error


def _changed(path: Path) -> int | None:
    """When a file was written last, in nanoseconds; None where there is none."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


@contextmanager
def _lock(path: Path) -> Generator[None]:
    """Held by one process at a time, and let go when that ends, however it does."""
    import fcntl

    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.warning("Waiting for another process that compiles the CPU kernels.")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            # Some network file systems have no locks. Two may then compile; each puts whole files
            # into place.
            _log.warning("%s cannot be locked: %s", path, error)
        yield


def _ingredients(headers: Headers, sources: Path) -> str:
    try:
        libc = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):
        libc = ""
    return _short(
        builder.source_digest(sources),
        " ".join((*builder.compile_flags(), *builder.link_flags())),
        headers.digest,
        builder.machine(),
        libc,
    )


def _short(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
