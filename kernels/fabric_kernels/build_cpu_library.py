"""Compiles the CPU kernels of ``csrc`` with the system's C++ compiler.

Standard library only: a wheel is built where jax is not installed. Beside a library lies its
``Record``, which says what it was made from, so that one that doesn't fit is never loaded.
"""

import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

SOURCES = Path(__file__).with_name("csrc")
COMPILERS = ("g++", "clang++", "c++")
# No -march: each instruction set has its own translation unit and is chosen at run time.
# Without NDEBUG an assertion of jaxlib's headers ends the process where a call has an argument of
# the wrong dtype; with it the call returns an error.
FLAGS = ("-O3", "-DNDEBUG", "-std=c++17", "-fPIC", "-fvisibility=hidden")
# A compiler that takes longer than this for one file hangs.
TIMEOUT_SECONDS = 600

_PACKAGES = (
    "macOS: xcode-select --install"
    if sys.platform == "darwin"
    else "Debian and Ubuntu: apt install g++; Fedora: dnf install gcc-c++"
)
INSTALL_COMPILER = f"Install a C++17 compiler ({_PACKAGES}) or name one in CXX"

OTHER_COMPILER = "Mend it or name another compiler in CXX"


class BuildError(RuntimeError):
    """No library could be built.

    Args:
        problem: why.
        fix: what the reader can do now.
    """

    def __init__(self, problem: str, fix: str) -> None:
        """Keeps both parts beside the one message."""
        super().__init__(f"{problem}. {fix}.")
        self.problem = problem
        self.fix = fix


@dataclass(frozen=True, kw_only=True)
class Compiler:
    """A C++ compiler.

    Attributes:
        command: its path and the arguments that always come first.
        banner: all it says about its version and target.
    """

    command: tuple[str, ...]
    banner: str

    @property
    def name(self) -> str:
        """The banner's first line."""
        return self.banner.partition("\n")[0]


@dataclass(frozen=True, kw_only=True)
class Headers:
    """The headers of XLA's foreign function interface.

    Attributes:
        folder: for the compiler to look in.
        api_version: major and minor number of the interface.
        digest: of all headers.
    """

    folder: Path
    api_version: tuple[int, int]
    digest: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a library was made from, in JSON beside it.

    Attributes:
        library: SHA-256 of the library.
        sources: digest of the sources.
        api_major: of the interface's version in the headers.
        api_minor: of the same.
        machine: what it runs on.
        compiler: what compiled it.
    """

    library: str
    sources: str
    api_major: int
    api_minor: int
    machine: str
    compiler: str


def find_compiler() -> Compiler:
    """The compiler that CXX names, else the first of ``COMPILERS`` that runs.

    Raises:
        BuildError: there is none, or the named one doesn't run.
    """
    named = os.environ.get("CXX", "").strip()
    try:
        choices = [shlex.split(named)] if named else [[name] for name in COMPILERS]
    except ValueError as error:
        raise BuildError(f"CXX={named!r} is no command: {error}", INSTALL_COMPILER) from error
    for name, *arguments in choices:
        path = shutil.which(name)
        if path is None:
            continue
        command = (path, *arguments)
        try:
            done = _run((*command, "--version"), timeout=60)
        except (OSError, subprocess.SubprocessError):
            continue
        if done.returncode == 0:
            return Compiler(command=command, banner=done.stdout.strip())
    if named:
        raise BuildError(f"the compiler CXX={named} cannot be run", INSTALL_COMPILER)
    raise BuildError(
        f"there is no C++ compiler (looked for {', '.join(COMPILERS)})", INSTALL_COMPILER
    )


def find_headers() -> Headers:
    """Those of the installed jaxlib, which is not imported.

    Raises:
        BuildError: there is no jaxlib, or it has none.
    """
    spec = importlib.util.find_spec("jaxlib")
    for package in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(package, "include")
        api = folder / "xla/ffi/api/c_api.h"
        if not api.is_file():
            continue
        text = api.read_text(encoding="utf-8")
        numbers = [
            re.search(rf"^#define XLA_FFI_API_{part} (\d+)", text, re.MULTILINE)
            for part in ("MAJOR", "MINOR")
        ]
        if numbers[0] and numbers[1]:
            return Headers(
                folder=folder,
                api_version=(int(numbers[0].group(1)), int(numbers[1].group(1))),
                digest=digest_of(api.parent.glob("*.h")),
            )
    raise BuildError("jaxlib's headers are not installed", "Install jax: python -m pip install jax")


def source_digest(sources: Path = SOURCES) -> str:
    """Of all files that a library is compiled from."""
    return digest_of(path for path in sources.iterdir() if path.suffix in (".cpp", ".h"))


def digest_of(files: Iterable[Path]) -> str:
    """SHA-256 over names and contents, whatever the order."""
    total = hashlib.sha256()
    for path in sorted(files):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.name} {content}\n".encode())
    return total.hexdigest()


def extra_flags() -> tuple[str, ...]:
    """What FABRIC_KERNELS_CXXFLAGS holds: sanitizers, say.

    Raises:
        BuildError: its quotes don't match.
    """
    flags = os.environ.get("FABRIC_KERNELS_CXXFLAGS", "")
    try:
        return tuple(shlex.split(flags))
    except ValueError as error:
        problem = f"FABRIC_KERNELS_CXXFLAGS={flags!r} cannot be split: {error}"
        raise BuildError(problem, "Unset it") from error


def compile_flags() -> tuple[str, ...]:
    """For every step."""
    return (*FLAGS, *extra_flags())


def link_flags() -> tuple[str, ...]:
    """For the last step. Symbols are stripped unless there are flags that may want them."""
    strip = "-Wl,-x" if sys.platform == "darwin" else "-Wl,-s"
    return ("-shared",) if extra_flags() else ("-shared", strip)


def machine() -> str:
    """Operating system and processor family."""
    return f"{sys.platform}-{platform.machine()}"


def record_path(library: Path) -> Path:
    """Where the record of a library lies."""
    return library.with_suffix(".json")


def log_path(library: Path) -> Path:
    """Where all lies that was run and said to build a library."""
    return library.with_suffix(".log")


def read_record(library: Path) -> Record | None:
    """The record of an intact library; None where one of the two is missing or damaged."""
    try:
        record = Record(**json.loads(record_path(library).read_text(encoding="utf-8")))
        intact = record.library == hashlib.sha256(library.read_bytes()).hexdigest()
    except (OSError, ValueError, TypeError):
        return None
    return record if intact else None


def build(target: Path, compiler: Compiler, headers: Headers, sources: Path = SOURCES) -> Record:
    """Compiles all of ``sources``, several files at once, and puts the library into place whole.

    The record goes beside it, and so does the log, which is there after a failure as well.

    Raises:
        BuildError: the compiler failed; the message has its first complaint and the log's path.
        OSError: the folder can't be written.
    """
    log = log_path(target)
    digest = source_digest(sources)
    # The library's own folder may forbid what compilers do (or be a slow network's).
    with tempfile.TemporaryDirectory(prefix="fabric_kernels-") as scratch:
        made, said, complaint = _compile(Path(scratch), compiler, headers, sources)
        _put(log, said.encode())
        if complaint:
            raise BuildError(
                f"{compiler.name} failed: {complaint} (all it said is in {log})",
                OTHER_COMPILER,
            )
        content = made.read_bytes()
    record = Record(
        library=hashlib.sha256(content).hexdigest(),
        sources=digest,
        api_major=headers.api_version[0],
        api_minor=headers.api_version[1],
        machine=machine(),
        compiler=compiler.name,
    )
    # In this order: a library without its record is not used.
    _put(target, content)
    _put(record_path(target), json.dumps(asdict(record), indent=2).encode())
    return record


def _compile(
    scratch: Path, compiler: Compiler, headers: Headers, sources: Path
) -> tuple[Path, str, str]:
    """(library, log, first complaint or nothing)."""
    flags = compile_flags()
    files = sorted(sources.glob("*.cpp"))
    objects = [scratch / f"{path.stem}.o" for path in files]
    base = (*compiler.command, *flags, "-isystem", str(headers.folder), "-c")
    commands = [
        (*base, str(path), "-o", str(target)) for path, target in zip(files, objects, strict=True)
    ]
    library = scratch / "library.so"
    link = (*compiler.command, *flags, *link_flags(), *map(str, objects), "-o", str(library))
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        steps: list[tuple[str, str]] = []
        for future in as_completed([pool.submit(_step, command) for command in commands]):
            steps.append(future.result())
            if steps[-1][1]:
                pool.shutdown(cancel_futures=True)
                break
        else:
            steps.append(_step(link))
    said = "\n".join(text for text, _ in steps)
    return library, said, next((complaint for _, complaint in steps if complaint), "")


def _step(command: Sequence[str]) -> tuple[str, str]:
    """Runs one command: (what was run and said, first complaint or nothing)."""
    line = f"$ {shlex.join(command)}\n"
    try:
        done = _run(command, timeout=TIMEOUT_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        return line + str(error), str(error)
    if done.returncode == 0:
        return line + done.stdout, ""
    lines = [text.strip() for text in done.stdout.splitlines() if text.strip()]
    errors = [text for text in lines if "error" in text.lower()]
    return line + done.stdout, (errors or lines or [f"exit code {done.returncode}"])[0]


def _run(command: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout,
        env={**os.environ, "LC_ALL": "C"},
        check=False,
    )


def _put(path: Path, content: bytes) -> None:
    """Writes a file so that others see all of it or none."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
