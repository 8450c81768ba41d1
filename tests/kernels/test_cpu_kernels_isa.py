"""Every instruction set of the CPU kernels against scalar arithmetic, without jax.

``native/`` is a program around the kernels' sources. It is compiled with AddressSanitizer and
UndefinedBehaviorSanitizer, gives the kernels buffers without a byte to spare, and prints a digest
of the results that must be the same everywhere.
"""

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fabric_kernels.build_cpu_library import SOURCES, BuildError, find_compiler

NATIVE = Path(__file__).with_name("native")
STEP = SOURCES / "decode_step.cpp"
KERNELS = [*sorted(SOURCES.glob("kernels_*.cpp")), STEP, *sorted(NATIVE.glob("kernels_*.cpp"))]
REFERENCE = [SOURCES / "select.cpp", NATIVE / "main.cpp", *sorted(NATIVE.glob("check_*.cpp"))]
ISAS = ("avx512vnni", "avxvnni", "avx2", "neon", "portable")  # fastest first
SANITIZERS = ("-Og", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREADS = ("-O1", "-fsanitize=thread", "-pthread")
X86 = platform.machine() in ("x86_64", "AMD64")

# One worker, so that the program is compiled once: that is most of the time.
pytestmark = pytest.mark.xdist_group("native program")


def run(command: Sequence[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: v for name, v in os.environ.items() if name != "FABRIC_KERNELS_ISA"}
    return subprocess.run(
        [str(part) for part in command],
        env={**inherited, "LC_ALL": "C", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )


def compile_all(compiler: Sequence[str], flags: Sequence[str], folder: Path) -> list[Path]:
    """Object files of the kernels, with ``flags``, and of what they are compared with."""

    def step(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        own = flags if source in KERNELS else ("-O2",)
        base = (*compiler, "-std=c++17", *own, "-I", str(SOURCES), "-c")
        done = run((*base, source, "-o", target))
        assert done.returncode == 0, done.stdout
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(step, KERNELS + REFERENCE))


def link(compiler: Sequence[str], flags: Sequence[str], objects: list[Path], to: Path) -> Path:
    done = run((*compiler, *flags, *objects, "-o", to))
    assert done.returncode == 0, done.stdout
    return to


@dataclass
class Program:
    """The program; each set of kernels is checked once."""

    command: tuple[str, ...]
    checked: dict[str, subprocess.CompletedProcess[str]] = field(default_factory=dict)

    def check(self, isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        if isa not in self.checked:
            # What leaks is asked of ptrace, which containers may forbid.
            environment = {"ASAN_OPTIONS": "detect_leaks=0", "FABRIC_KERNELS_ISA": isa}
            self.checked[isa] = run((*self.command, *arguments), **environment)
        return self.checked[isa]

    def digest(self, isa: str, *arguments: str) -> str:
        """Of all results, if all are right; skips where this processor lacks the set."""
        done = self.check(isa, *arguments)
        if done.returncode == 2:
            pytest.skip(done.stdout.strip())
        assert done.returncode == 0, done.stdout
        name, results, digest = done.stdout.split()
        assert name == (arguments or (isa,))[0]
        assert int(results) > 1_000_000
        return digest

    def name(self, isa: str = "") -> str:
        """Of the set in use, or the message that there is none."""
        return run((*self.command, "name"), FABRIC_KERNELS_ISA=isa).stdout.strip()


def compiler_with(flags: Sequence[str], folder: Path) -> tuple[str, ...]:
    """The compiler, if its programs run with these flags; else the test is skipped."""
    try:
        compiler = find_compiler().command
    except BuildError as error:
        pytest.skip(str(error))
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    if run((*compiler, *flags, probe, "-o", folder / "probe")).returncode != 0:
        pytest.skip("the compiler has no sanitizers")
    started = run((folder / "probe",))
    if started.returncode != 0:
        # ThreadSanitizer ends an empty program too where the system spreads addresses further than
        # it can map (vm.mmap_rnd_bits above 28 with GCC 12): nothing of ours has run by then.
        pytest.skip(f"an empty program with {' '.join(flags)} does not run: {started.stdout}")
    return compiler


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """With sanitizers, for this machine."""
    folder = tmp_path_factory.mktemp("native")
    compiler = compiler_with(SANITIZERS, folder)
    objects = compile_all(compiler, SANITIZERS, folder)
    return Program(command=(str(link(compiler, SANITIZERS, objects, folder / "check")),))


def test_threads_of_a_step_of_decoding_do_not_race(tmp_path: Path):
    compiler = compiler_with(THREADS, tmp_path)
    sources = ("kernels_portable.cpp", STEP.name, "scratch.cpp")
    command = (*compiler, "-std=c++17", *THREADS, "-I", SOURCES, "-o", tmp_path / "race")
    done = run((*command, *(SOURCES / name for name in sources), NATIVE / "race_decode.cpp"))
    assert done.returncode == 0, done.stdout
    done = run((tmp_path / "race",))
    assert (done.returncode, done.stdout) == (0, "20 steps\n")


@pytest.mark.parametrize("isa", ISAS)
def test_results_and_memory(program: Program, isa: str):
    assert program.digest(isa) == program.digest("portable")


def test_avx_vnni_where_only_avx512_has_the_instruction(program: Program):
    digest = program.digest("", "avxvnni-evex")
    assert digest == program.digest("portable")


def test_the_best_set_of_this_processor_is_chosen(program: Program):
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        pytest.skip("only Linux tells what the processor has")
    words = set(cpuinfo.read_text(encoding="utf-8").split())
    needs = {
        "avx512vnni": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "fma"},
        "avxvnni": {"avx2", "fma", "f16c", "avx_vnni"},
        "avx2": {"avx2", "fma", "f16c"},
        "neon": {"asimddp"},
        "portable": set(),
    }
    here = [isa for isa in ISAS if needs[isa] <= words]
    assert program.name() == here[0]
    for isa in ISAS:
        found = program.name(isa)
        expected = f"FABRIC_KERNELS_ISA={isa} is not available; expected one of {', '.join(here)}"
        assert found == (isa if isa in here else expected)


def test_an_unknown_name_is_an_error(program: Program):
    assert program.name("avx9").startswith(
        "FABRIC_KERNELS_ISA=avx9 is not available; expected one of "
    )
    assert program.name("avx9").endswith("portable")


@pytest.fixture(scope="module")
def arm_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled for ARM on another machine."""
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if not X86 or compiler is None:
        pytest.skip("no cross compiler (Debian: apt install g++-aarch64-linux-gnu)")
    folder = tmp_path_factory.mktemp("arm")
    objects = compile_all((compiler,), ("-O2",), folder)
    return link((compiler,), ("-static",), objects, folder / "check")


@pytest.mark.slow
def test_arm_under_emulation(arm_program: Path, program: Program):
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if emulator is None:
        pytest.skip("compiled, not run: no emulator (Debian: apt install qemu-user)")
    arm = Program(command=(emulator, "-cpu", "neoverse-n1", str(arm_program)))
    assert arm.name() == "neon"
    assert arm.digest("neon") == program.digest("portable")
    old = Program(command=(emulator, "-cpu", "cortex-a53", str(arm_program)))
    assert old.name() == "portable"
    assert old.name("neon") == (
        "FABRIC_KERNELS_ISA=neon is not available; expected one of portable"
    )


@pytest.mark.slow
@pytest.mark.parametrize("target", ["x86_64-linux-gnu", "aarch64-linux-gnu"])
def test_clang_compiles_every_set(target: str, tmp_path: Path):
    clang = shutil.which("clang++")
    if clang is None:
        pytest.skip("no clang++")
    compiler = (clang, f"--target={target}")
    probe = tmp_path / "probe.cpp"
    probe.write_text("#include <cmath>\n")
    if run((*compiler, "-c", probe, "-o", tmp_path / "probe.o")).returncode != 0:
        pytest.skip(f"no C++ library for {target}")
    assert compile_all(compiler, ("-O1",), tmp_path)
