"""Variables of a cell's process; they must be there before jax is imported."""

import os
import sys

from fabric_jax.sweeps.experiment import PLATFORM_VARIABLE

# What jax is told on each platform. Where nothing runs, programs are made by a process on the CPU.
BACKENDS = {"cpu": "cpu", "cuda": "cuda,cpu"}
# What a shell may have set for something else and would change what is measured.
UNSET = (
    *("XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION"),
    *("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_ALLOCATOR", "TF_GPU_ALLOCATOR"),
    *("JAX_PLATFORMS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION"),
)


def chosen_variables(platform: str, own: dict[str, str], cache: str) -> dict[str, str]:
    """What is set for a cell and recorded with it.

    Args:
        platform: of the cell.
        own: what the experiment asks for; it goes first.
        cache: folder for compiled programs that cells share; "" for none.
    """
    chosen = {"JAX_PLATFORMS": BACKENDS.get(platform, "cpu"), PLATFORM_VARIABLE: platform}
    if platform == "cuda":
        # With a pool of its own the allocator counts what was asked for; without, it hands out
        # (and counts) blocks of up to twice the size.
        chosen["XLA_PYTHON_CLIENT_PREALLOCATE"] = "true"
    if cache:
        chosen["JAX_COMPILATION_CACHE_DIR"] = cache
        chosen["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return chosen | own


def process_environment(chosen: dict[str, str]) -> dict[str, str]:
    """The whole environment of a cell's process."""
    kept = {key: value for key, value in os.environ.items() if key not in UNSET}
    paths = [path for path in sys.path if path]
    return kept | {"PYTHONPATH": os.pathsep.join(paths)} | chosen


def recorded_variables(chosen: dict[str, str]) -> dict[str, str]:
    """``chosen`` without paths of this machine, and what XLA reads besides."""
    recorded = {k: "set" if k == "JAX_COMPILATION_CACHE_DIR" else v for k, v in chosen.items()}
    flags = os.environ.get("XLA_FLAGS")
    return recorded | ({"XLA_FLAGS": flags} if flags else {})
