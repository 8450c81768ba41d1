"""The compiled CPU kernels: loaded once a process and registered with XLA.

A library shipped with the package comes first, then one in the user's cache, compiled there when it
is first needed. Environment variables:

* ``FABRIC_KERNELS_CPU=0``: no library is looked for.
* ``FABRIC_KERNELS_CACHE``: folder of built libraries (default ``~/.cache/fabric_jax``).
* ``CXX``: the compiler; ``FABRIC_KERNELS_CXXFLAGS``: flags added to ours; a
  library is then always built.
* ``FABRIC_KERNELS_ISA``: the instruction set to use instead of the best one.
"""

import ctypes
import logging
import os
import threading
from dataclasses import dataclass

import jax

from fabric_kernels.build_cpu_library import BuildError
from fabric_kernels.cpu_library_files import LibraryFile, Origin, find_or_build, find_shipped

TARGETS = {
    "fabric_ternary_codes": "FabricTernaryCodes",
    "fabric_ternary_linear": "FabricTernaryLinear",
    "fabric_ternary_transposed": "FabricTernaryTransposed",
    "fabric_table": "FabricTable",
    "fabric_block_table": "FabricBlockTable",
    "fabric_table_transposed": "FabricTableTransposed",
    "fabric_norm": "FabricNorm",
    "fabric_norm_gradient": "FabricNormGradient",
    "fabric_attention": "FabricAttention",
    "fabric_attention_transposed": "FabricAttentionTransposed",
    "fabric_cached_attention": "FabricCachedAttention",
    "fabric_decode_layers": "FabricDecodeLayers",
}
"""Names of the calls for ``jax.ffi.ffi_call``, and the library's symbols."""

REINSTALL = "Reinstall the package"

_log = logging.getLogger("fabric_kernels")
_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class CpuLibrary:
    """The library in use.

    Attributes:
        path: its file.
        isa: the instruction set that its kernels use on this processor.
        origin: ``shipped`` inside the package, or ``built`` on this machine.
        compiler: what compiled it.
    """

    path: str
    isa: str
    origin: Origin
    compiler: str


@dataclass(frozen=True, kw_only=True)
class CpuLibraryStatus:
    """The library, or why there is none.

    Attributes:
        library: None where there is none.
        problem: why, in one line.
        fix: what to do about it.
    """

    library: CpuLibrary | None
    problem: str = ""
    fix: str = ""


class CpuLibraryError(RuntimeError):
    """The CPU kernels cannot be had.

    Args:
        problem: why.
        fix: what the reader can do now.
    """

    def __init__(self, problem: str, fix: str) -> None:
        """Keeps both parts beside the one message."""
        super().__init__(f"no CPU kernels: {problem}. {fix}.")
        self.problem = problem
        self.fix = fix


_status: CpuLibraryStatus | None = None
_told = False


def load() -> CpuLibrary:
    """Loads the library and registers its calls; after the first time, says what is loaded.

    Compiles it where there is none yet, which takes up to a minute. Any thread may call this.

    Raises:
        CpuLibraryError: it is switched off, or can be neither found nor built, or doesn't load.
    """
    found = status()
    if found.library is None:
        raise CpuLibraryError(found.problem, found.fix)
    return found.library


def available() -> bool:
    """Whether ``load`` succeeds; tries it. Says once on standard error why it does not."""
    global _told
    found = status()
    if found.library is None and not _told and not _switched_off():
        _told = True
        _log.warning(
            "No CPU kernels; products run on XLA, several times slower: %s. %s.",
            found.problem,
            found.fix,
        )
    return found.library is not None


def status() -> CpuLibraryStatus:
    """What is loaded, after trying, or why nothing is; the outcome of the first try stays."""
    global _status
    if _switched_off():
        return CpuLibraryStatus(
            library=None, problem="FABRIC_KERNELS_CPU=0 switches them off", fix="Unset it"
        )
    if _status is None:
        with _lock:
            if _status is None:
                _status = _try()
    return _status


def _try() -> CpuLibraryStatus:
    try:
        return CpuLibraryStatus(library=_load())
    except (BuildError, CpuLibraryError) as error:
        return CpuLibraryStatus(library=None, problem=error.problem, fix=error.fix)
    except OSError as error:
        return CpuLibraryStatus(library=None, problem=str(error), fix=REINSTALL)


def _switched_off() -> bool:
    return os.environ.get("FABRIC_KERNELS_CPU", "1") == "0"


def _load() -> CpuLibrary:
    shipped = find_shipped()
    if isinstance(shipped, LibraryFile):
        try:
            return _use(shipped, ctypes.CDLL(str(shipped.path)))
        # Compiled on a newer system, say; what is built here loads here.
        except OSError as error:
            shipped = f"the library of the package cannot be loaded: {error}"
    try:
        file = find_or_build()
    except BuildError as error:
        problem = f"{shipped}, and {error.problem}" if shipped else error.problem
        raise CpuLibraryError(problem, error.fix) from error
    try:
        return _use(file, ctypes.CDLL(str(file.path)))
    except OSError as error:
        raise CpuLibraryError(
            f"the library cannot be loaded: {error}",
            "Set FABRIC_KERNELS_CACHE to a folder that programs may be run from",
        ) from error


def _use(file: LibraryFile, library: ctypes.CDLL) -> CpuLibrary:
    """Registers the calls of a library that fits."""
    try:
        isa = _isa(library)
        for name, symbol in TARGETS.items():
            capsule = jax.ffi.pycapsule(getattr(library, symbol))
            jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    except (AttributeError, RuntimeError) as error:
        raise CpuLibraryError(
            f"XLA does not take the calls of {file.path}: {error}", REINSTALL
        ) from error
    return CpuLibrary(
        path=str(file.path), isa=isa, origin=file.origin, compiler=file.record.compiler
    )


def _isa(library: ctypes.CDLL) -> str:
    ask = library.FabricKernelsIsa
    ask.argtypes = [ctypes.POINTER(ctypes.c_char_p)]
    ask.restype = ctypes.c_char_p
    message = ctypes.c_char_p()
    name: bytes | None = ask(ctypes.byref(message))
    if name is None:
        raise CpuLibraryError((message.value or b"").decode(), "Unset FABRIC_KERNELS_ISA")
    return name.decode()
