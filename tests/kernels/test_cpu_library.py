"""Finding, building and loading the compiled library; mostly with one of a few lines."""

import ctypes
import dataclasses
import os
import re
import stat
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest
from fabric_kernels import build_cpu_library as builder
from fabric_kernels import cpu_library, cpu_library_files
from fabric_kernels.build_cpu_library import BuildError
from fabric_kernels.cpu_library import CpuLibrary, CpuLibraryError, CpuLibraryStatus
from fabric_kernels.cpu_library_files import LibraryFile, find_or_build, find_shipped

ROOT = Path(__file__).resolve().parents[2]
TINY = """
#include "tiny.h"
extern "C" __attribute__((visibility("default"))) int Answer() { return kAnswer; }
"""
# Finds or builds a library as a process of its own, without the package, which imports jax.
PROBE = """
import sys, types
package = types.ModuleType("fabric_kernels")
package.__path__ = [sys.argv[1]]
sys.modules["fabric_kernels"] = package
from pathlib import Path
from fabric_kernels.cpu_library_files import find_or_build
try:
    print(find_or_build(Path(sys.argv[2])).path)
except RuntimeError as error:
    print(error)
assert "jax" not in sys.modules
"""


def need_compiler() -> str:
    """The path of the compiler; skips where there is none."""
    try:
        return builder.find_compiler().command[0]
    except BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CPU", "CXXFLAGS", "ISA"):
        monkeypatch.delenv(f"FABRIC_KERNELS_{name}", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("FABRIC_KERNELS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def library() -> CpuLibrary:
    """The real one, from the package or the user's cache; the first time it is compiled there."""
    if not cpu_library.available():
        need_compiler()
    return cpu_library.load()


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    need_compiler()
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "tiny.cpp").write_text(TINY)
    (folder / "other.cpp").write_text("int Unused() { return 1; }")
    (folder / "tiny.h").write_text("constexpr int kAnswer = 42;")
    return folder


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """CXX is a slow compiler that notes each call; returns its notes."""
    real = need_compiler()
    notes = tmp_path / "calls"
    notes.touch()
    script = tmp_path / "slow++"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *--version*) ;; *) echo "$@" >> {notes}; sleep 0.3;; esac\n'
        f'exec {real} "$@"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(script))
    return notes


def calls(notes: Path) -> int:
    return len(notes.read_text().splitlines())


def answer(library: Path) -> int:
    return ctypes.CDLL(str(library)).Answer()


def test_a_library_is_compiled_once(compiler: Path, sources: Path, caplog):
    first = find_or_build(sources)
    assert answer(first.path) == 42
    assert first.origin == "built"
    assert first.record.api_minor == builder.find_headers().api_version[1]
    # Two files and a link.
    assert calls(compiler) == 3
    assert find_or_build(sources) == first
    assert calls(compiler) == 3
    assert [message[:9] for message in caplog.messages] == ["Compiling"]


def test_what_is_damaged_is_rebuilt(compiler: Path, sources: Path):
    path = find_or_build(sources).path
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        # A new file: the one that this process has loaded stays as it is.
        path.unlink()
        path.write_bytes(damage)
        assert find_or_build(sources).path == path
        assert path.read_bytes() == whole
    record = builder.record_path(path)
    for damage in ("{}", "[1]", "no JSON", '{"library": 3}'):
        record.write_text(damage)
        find_or_build(sources)
        assert builder.read_record(path) is not None
    assert calls(compiler) == 3 * 8


def test_whatever_changes_another_library_is_built(
    monkeypatch: pytest.MonkeyPatch, compiler: Path, sources: Path
):
    paths = [find_or_build(sources).path]
    headers = builder.find_headers()
    newer = dataclasses.replace(headers, digest="of another jaxlib")
    with monkeypatch.context() as patch:
        patch.setattr(builder, "find_headers", lambda: newer)
        paths.append(find_or_build(sources).path)
    with monkeypatch.context() as patch:
        patch.setenv("FABRIC_KERNELS_CXXFLAGS", "-DNAME='a b' -g")
        paths.append(find_or_build(sources).path)
    with monkeypatch.context() as patch:
        patch.setenv("CXX", f"{builder.find_compiler().command[0]} -DOTHER")
        paths.append(find_or_build(sources).path)
    with monkeypatch.context() as patch:
        patch.setattr(builder, "machine", lambda: "linux-other")
        paths.append(find_or_build(sources).path)
    (sources / "tiny.h").write_text("constexpr int kAnswer = 43;")
    paths.append(find_or_build(sources).path)
    assert len(set(paths)) == 6
    assert answer(paths[0]) == 42
    assert answer(paths[-1]) == 43
    commands = compiler.read_text()
    assert "-DNAME=a b -g" in commands
    assert "-DOTHER" in commands


def start(sources: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", PROBE, str(ROOT / "kernels" / "fabric_kernels"), str(sources)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_of_processes_that_start_at_once_one_compiles(compiler: Path, sources: Path):
    processes = [start(sources) for _ in range(3)]
    said = [process.communicate(timeout=60) for process in processes]
    assert {process.returncode for process in processes} == {0}, said
    (path,) = {out.strip() for out, _ in said}
    assert answer(Path(path)) == 42
    assert calls(compiler) == 3
    assert sum("Compiling" in errors for _, errors in said) == 1
    left = {file.suffix for file in Path(path).parent.iterdir()}
    assert left == {".so", ".json", ".log", ".lock"}


def test_those_that_wait_do_not_repeat_a_failure(compiler: Path, sources: Path):
    (sources / "other.cpp").write_text("int Unused() { return missing; }")
    processes = [start(sources) for _ in range(2)]
    said = [process.communicate(timeout=60) for process in processes]
    assert {process.returncode for process in processes} == {0}, said
    texts = sorted(out for out, _ in said)
    assert "another process has just failed" in texts[0]
    assert "error: 'missing'" in texts[1].replace("‘", "'").replace("’", "'")
    assert calls(compiler) == 2
    # A later one tries again, though the clock was years ahead when the log was written.
    later = time.time() + 1e8
    for log in Path(os.environ["FABRIC_KERNELS_CACHE"]).rglob("*.log"):
        os.utime(log, (later, later))
    with pytest.raises(BuildError, match="missing"):
        find_or_build(sources)


def test_a_failure_names_the_first_error_and_the_log(sources: Path, tmp_path: Path):
    (sources / "other.cpp").write_text('#include "nowhere.h"')
    with pytest.raises(BuildError, match=r"nowhere\.h.*all it said is in") as caught:
        find_or_build(sources)
    (log,) = (tmp_path / "cache").glob("*.log")
    assert str(log) in caught.value.problem
    assert "-O3" in log.read_text()
    assert "CXX" in caught.value.fix
    assert not list((tmp_path / "cache").glob("*.so"))


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, sources: Path, tmp_path: Path):
    found = find_or_build(sources)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_or_build(sources) == found, "what an earlier compiler left is used"
    (sources / "tiny.h").write_text("constexpr int kAnswer = 44;")
    with pytest.raises(BuildError, match=r"there is no C\+\+ compiler") as caught:
        find_or_build(sources)
    assert "CXX" in caught.value.fix


@pytest.mark.parametrize("named", ["nothing-of-this-name", "false", "g++ 'unmatched"])
def test_a_named_compiler_that_does_not_run_is_not_replaced(
    monkeypatch: pytest.MonkeyPatch, sources: Path, named: str
):
    monkeypatch.setenv("CXX", named)
    with pytest.raises(BuildError, match=re.escape(named.split()[0])):
        find_or_build(sources)


def test_a_cache_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, sources: Path, tmp_path: Path
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FABRIC_KERNELS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BuildError, match=r"file/cache cannot be written.*FABRIC_KERNELS_CACHE"):
        find_or_build(sources)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert cpu_library_files.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("FABRIC_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cpu_library_files.cache_folder() == tmp_path / "fabric_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cpu_library_files.cache_folder() == tmp_path / "home" / ".cache" / "fabric_jax"


def shipped(sources: Path, tmp_path: Path, **changes: object) -> LibraryFile | str:
    """What ``find_shipped`` says about a library whose record is changed so."""
    path = tmp_path / "package" / "tiny.so"
    if not path.exists():
        path.parent.mkdir()
        builder.build(path, builder.find_compiler(), builder.find_headers(), sources)
    record = builder.read_record(path)
    assert record is not None
    fields = {**dataclasses.asdict(record), **changes}
    builder.record_path(path).write_text(builder.json.dumps(fields))
    outcome = find_shipped(path, sources)
    builder.record_path(path).write_text(builder.json.dumps(dataclasses.asdict(record)))
    return outcome


def test_a_shipped_library_is_used_where_it_fits(
    monkeypatch: pytest.MonkeyPatch, sources: Path, tmp_path: Path
):
    assert find_shipped(tmp_path / "none.so", sources) == ""
    major, minor = builder.find_headers().api_version
    for older in (minor, minor - 1):
        found = shipped(sources, tmp_path, api_minor=older)
        assert isinstance(found, LibraryFile)
        assert found.origin == "shipped"
    newer = shipped(sources, tmp_path, api_minor=minor + 1)
    assert newer == (
        f"the library of the package needs version {major}.{minor + 1} of XLA's foreign function "
        f"interface; this jaxlib has {major}.{minor}"
    )
    assert f"needs version {major + 1}.0" in str(
        shipped(sources, tmp_path, api_major=major + 1, api_minor=0)
    )
    assert "is for linux-other" in str(shipped(sources, tmp_path, machine="linux-other"))
    assert "damaged" in str(shipped(sources, tmp_path, library="0" * 64))
    monkeypatch.setenv("FABRIC_KERNELS_CXXFLAGS", "-g")
    assert shipped(sources, tmp_path) == "", "flags of one's own ask for a build"
    monkeypatch.delenv("FABRIC_KERNELS_CXXFLAGS")
    (sources / "tiny.h").write_text("constexpr int kAnswer = 45;")
    assert "other sources" in str(shipped(sources, tmp_path))


def test_the_library_loads_and_says_what_it_uses(library: CpuLibrary):
    assert cpu_library.available()
    assert cpu_library.status() == CpuLibraryStatus(library=library)
    assert cpu_library.load() is library
    assert Path(library.path).is_file()
    assert library.isa
    assert library.compiler


def test_threads_load_once(monkeypatch: pytest.MonkeyPatch, library: CpuLibrary):
    tried: list[int] = []

    def slow() -> CpuLibrary:
        tried.append(1)
        time.sleep(0.2)
        return library

    monkeypatch.setattr(cpu_library, "_status", None)
    monkeypatch.setattr(cpu_library, "_load", slow)
    found: list[CpuLibrary] = []
    threads = [threading.Thread(target=lambda: found.append(cpu_library.load())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [library] * 8
    assert len(tried) == 1


@pytest.mark.usefixtures("library")
def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, caplog):
    with monkeypatch.context() as patch:
        patch.setenv("FABRIC_KERNELS_CPU", "0")
        assert not cpu_library.available()
        with pytest.raises(CpuLibraryError, match="FABRIC_KERNELS_CPU=0"):
            cpu_library.load()
    assert cpu_library.available()
    assert not caplog.messages, "who switches them off need not be told"


@pytest.mark.parametrize(
    "error",
    [BuildError("no luck", "Try harder"), CpuLibraryError("no luck", "Try"), OSError("no luck")],
)
def test_what_fails_is_said_once_and_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog, error: Exception
):
    tried: list[int] = []

    def fail() -> None:
        tried.append(1)
        raise error

    monkeypatch.setattr(cpu_library, "_status", None)
    monkeypatch.setattr(cpu_library, "_told", False)
    monkeypatch.setattr(cpu_library, "_load", fail)
    assert not cpu_library.available()
    assert not cpu_library.available()
    with pytest.raises(CpuLibraryError, match="no luck"):
        cpu_library.load()
    assert len(tried) == 1
    assert len(caplog.messages) == 1
    assert "several times slower: no luck." in caplog.messages[0]
    assert cpu_library.status().library is None
    assert cpu_library.status().fix


def test_a_shipped_library_that_does_not_load_is_replaced(
    monkeypatch: pytest.MonkeyPatch, library: CpuLibrary, tmp_path: Path
):
    record = builder.read_record(Path(library.path))
    assert record is not None
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"nothing that runs")
    monkeypatch.setattr(
        cpu_library,
        "find_shipped",
        lambda: LibraryFile(path=broken, origin="shipped", record=record),
    )
    monkeypatch.setattr(
        cpu_library,
        "find_or_build",
        lambda: LibraryFile(path=Path(library.path), origin="built", record=record),
    )
    assert cpu_library._load() == dataclasses.replace(library, origin="built")

    def fail() -> LibraryFile:
        raise BuildError("no compiler", "Get one")

    monkeypatch.setattr(cpu_library, "find_or_build", fail)
    with pytest.raises(CpuLibraryError, match=r"package cannot be loaded.*broken\.so.*no compiler"):
        cpu_library._load()


def test_a_library_without_our_calls_is_refused(sources: Path):
    file = find_or_build(sources)
    with pytest.raises(CpuLibraryError, match=r"does not take the calls.*FabricKernelsIsa"):
        cpu_library._use(file, ctypes.CDLL(str(file.path)))


def test_an_unknown_instruction_set_is_an_error(library: CpuLibrary):
    code = "from fabric_kernels import cpu_library; print(cpu_library.status().problem)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **builder.os.environ,
            "PYTHONPATH": str(ROOT / "kernels"),
            "FABRIC_KERNELS_ISA": "abacus",
            "FABRIC_KERNELS_CACHE": str(Path(library.path).parent),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert "FABRIC_KERNELS_ISA=abacus" in done.stdout
    assert "portable" in done.stdout


def test_wheels_are_compiled_against_the_oldest_jaxlib():
    """A library runs with versions of the interface that are newer than its own, not older."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (jax,) = (text for text in settings["project"]["dependencies"] if text.startswith("jax>"))
    hook = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"]["custom"]
    oldest = re.match(r"jax>=([\d.]+),", jax)
    assert oldest is not None
    assert hook["headers"].startswith(f"jaxlib=={oldest.group(1)};")
