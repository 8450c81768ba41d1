"""What a device can do at most, measured in the process that measures something else too."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from fabric_kernels import cpu_library
from fabric_kernels.ternary_matmul.peaks import make_peaks, pool_threads

from fabric_jax.measurement.timing import time_repeated

MATRIX = 8192
CPU_MATRIX = 1024
COPIED_BYTES = 1 << 30
CPU_COPIED_BYTES = 256 << 20
PEAK_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Peaks of this device, as measured.

    Attributes:
        operations: multiplications and additions a second of dense products.
        operation: which: ``int8 dot instruction`` by the CPU library's own loop, or the dtype of
            XLA's matrix product.
        bytes: a second from the device's memory.
    """

    operations: float
    operation: str
    bytes: float


def measure_limits() -> Limits:
    """Takes under a second; allocates 0.25 GiB on CPU, 2.4 GiB elsewhere."""
    if jax.default_backend() == "cpu":
        if cpu_library.available():
            peaks = make_peaks(pool_threads(), CPU_COPIED_BYTES, PEAK_SECONDS / 4)
            return Limits(
                operations=peaks.dot_operations(PEAK_SECONDS),
                operation="int8 dot instruction",
                bytes=peaks.read_bytes(PEAK_SECONDS),
            )
        return _by_xla(CPU_MATRIX, "float32", CPU_COPIED_BYTES)
    return _by_xla(MATRIX, "bfloat16", COPIED_BYTES)


def _by_xla(width: int, dtype: str, copied: int) -> Limits:
    a = jnp.ones((width, width), dtype)

    @jax.jit
    def product(x: jax.Array) -> jax.Array:
        # Both contracted on their last axis, which is how GPUs' matrix units read fastest.
        return jax.lax.dot_general(x, x, (((1,), (1,)), ((), ())), preferred_element_type=x.dtype)

    @jax.jit
    def copy(x: jax.Array) -> jax.Array:
        return x + 1

    seconds = time_repeated(lambda: product(a), repeats=5).fastest
    source = jnp.zeros(copied // 4, jnp.int32)
    copying = time_repeated(lambda: copy(source), repeats=5).fastest
    return Limits(
        operations=2.0 * width**3 / seconds, operation=dtype, bytes=2.0 * copied / copying
    )
