"""Programs for platforms that this machine may not have: compiled, or lowered only."""

import os
import time
from dataclasses import dataclass
from typing import Any, Literal

import jax
from fabric_kernels.ternary_matmul.compile_tpu import available, describe
from jax import export

from fabric_jax.measurement.categories import CompiledMemory, compiled_memory

TPU_TARGETS = {"tpu-v5e": "v5e", "tpu-v5p": "v5p", "tpu-v6e": "v6e", "tpu-7x": "tpu7x"}
LOWERED_TARGETS = {"rocm": "rocm", "metal": "METAL", "oneapi": "sycl"}
"""Jax's names of platforms whose compiler isn't part of jaxlib for CPU."""


class TargetUnavailable(Exception):
    """What compiles for the platform isn't installed, or refuses the program."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """What is known of a program that has not run.

    Attributes:
        kind: compiled, or lowered to StableHLO for the platform only.
        seconds: that it took.
        memory: by the compiler's plan; None where nothing was compiled.
        flops: operations of a run as the compiler counts them; None where it doesn't.
        bytes_accessed: bytes of a run, likewise.
        module_bytes: of the serialised module that was lowered; None where it was compiled.
        compiler: what compiled or lowered it.
    """

    kind: Literal["compiled", "lowered"]
    seconds: float
    memory: CompiledMemory | None
    flops: float | None
    bytes_accessed: float | None
    module_bytes: int | None
    compiler: str

    def metrics(self) -> dict[str, Any]:
        """As a record has them."""
        found: dict[str, Any] = {
            "kind": self.kind,
            ("compile_seconds" if self.kind == "compiled" else "lower_seconds"): self.seconds,
            "compiler": self.compiler,
            "flops": self.flops,
            "accessed_bytes": self.bytes_accessed,
            "module_bytes": self.module_bytes,
        }
        if self.memory is not None:
            found |= {
                "compiled_bytes": self.memory.total,
                "compiled_argument_bytes": self.memory.arguments,
                "compiled_temporary_bytes": self.memory.temporaries,
            }
        return {key: value for key, value in found.items() if value is not None}


def make_program(function: Any, arguments: tuple[Any, ...], platform: str) -> Program:
    """Compiles or lowers a jitted function for a platform, from shapes.

    Args:
        function: what ``jax.jit`` gives.
        arguments: trees of arrays or ``jax.ShapeDtypeStruct``.
        platform: a key of ``TPU_TARGETS`` or ``LOWERED_TARGETS``; any other is this process's own.

    Raises:
        TargetUnavailable: libtpu isn't installed or the compiler refuses the program.
    """
    start = time.perf_counter()
    if platform in LOWERED_TARGETS:
        return _lower(function, arguments, LOWERED_TARGETS[platform], start)
    compiler = f"jaxlib for {jax.default_backend()}"
    if platform in TPU_TARGETS:
        arguments, compiler = _for_tpu(arguments, TPU_TARGETS[platform])
    try:
        compiled = function.lower(*arguments).compile()
    except (RuntimeError, ValueError) as error:
        if platform not in TPU_TARGETS:
            raise
        raise TargetUnavailable(f"{compiler} refuses the program: {error}"[:600]) from error
    cost = _cost(compiled)
    return Program(
        kind="compiled",
        seconds=round(time.perf_counter() - start, 2),
        memory=compiled_memory(compiled),
        flops=cost.get("flops"),
        bytes_accessed=cost.get("bytes accessed"),
        module_bytes=None,
        compiler=compiler,
    )


def _lower(function: Any, arguments: tuple[Any, ...], name: str, start: float) -> Program:
    exported = export.export(function, platforms=[name])(*arguments)
    return Program(
        kind="lowered",
        seconds=round(time.perf_counter() - start, 2),
        memory=None,
        flops=None,
        bytes_accessed=None,
        module_bytes=len(exported.mlir_module_serialized),
        compiler=f"StableHLO for {name}, by jax {jax.__version__}",
    )


def _for_tpu(arguments: tuple[Any, ...], target: str) -> tuple[tuple[Any, ...], str]:
    """The arguments as they lie on a described chip."""
    if not available():
        raise TargetUnavailable(
            "libtpu is not installed, which compiles for TPUs: pip install 'jax[tpu]'"
        )
    from importlib.metadata import version

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    place = describe(target)

    def put(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree.map(put, arguments), f"libtpu {version('libtpu')} for {target}"


def _cost(compiled: Any) -> dict[str, float]:
    """XLA's count of a program's work; loops count once, so it is a floor."""
    found = compiled.cost_analysis()
    if isinstance(found, list):
        found = found[0] if found else None
    return {} if found is None else {str(k): float(v) for k, v in dict(found).items()}
