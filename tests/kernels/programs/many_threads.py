"""Prints a digest of products and gradients, each computed several times and by four threads.

Run as a process: the number of threads of XLA's pool, which NPROC sets, is fixed for a process.
"""

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from fabric_kernels import LowRank, Packing, TernaryWeight, pack, ternary_linear, ternary_matmul

# Enough work that a call is shared out among threads, at one row and at many.
N, K, RANK = 300, 515, 3
ROWS = (1, 3, 200)
THREADS, REPEATS = 4, 6


def inputs() -> tuple[list[tuple[TernaryWeight, ...]], LowRank, list[jax.Array]]:
    rng = np.random.default_rng(0)
    packings: tuple[Packing, ...] = ("ternary2", "ternary1.6")
    codes = [jnp.asarray(rng.integers(-1, 2, (n, K)), jnp.int8) for n in (N, N // 3)]
    scale = jnp.float32(0.37)
    weights = [
        tuple(TernaryWeight(pack(c, packing), scale, None, K, packing) for c in codes)
        for packing in packings
    ]
    a, b = (jnp.asarray(rng.standard_normal((RANK, width)), jnp.float32) for width in (K, N))
    rows = [jnp.asarray(rng.standard_normal((m, K)), jnp.float32) for m in ROWS]
    return weights, LowRank(a, b, 2.0), rows


@jax.jit
def everything(weights: Any, adapter: LowRank, x: jax.Array) -> Any:
    """Outputs and gradients of both widths, and integer products."""
    results: list[Any] = []
    for bits in (16, 24):

        def linear(x: jax.Array, adapter: LowRank, bits: Any = bits) -> tuple[jax.Array, ...]:
            return ternary_linear(
                x, weights, (adapter, None), implementation="cpu", gradient_bits=bits
            )

        outputs, pull = jax.vjp(linear, x, adapter)
        results += [outputs, pull(tuple(jnp.sin(y) for y in outputs))]
    first = weights[0]
    codes = jnp.round(100 * jnp.tanh(x)).astype(jnp.int8)
    results.append(ternary_matmul(codes, first.packed, packing=first.packing, implementation="cpu"))
    return results


def digest(weights: Any, adapter: LowRank, rows: list[jax.Array]) -> str:
    total = hashlib.sha256()
    for pair in weights:
        for x in rows:
            for leaf in jax.tree.leaves(everything(pair, adapter, x)):
                total.update(np.asarray(leaf).tobytes())
    return total.hexdigest()


def pool_threads() -> int | None:
    """Threads of XLA's pool, where the system tells (Linux)."""
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return sum(name.startswith("tf_XLAEigen") for name in names) or None


def main() -> None:
    arguments = inputs()
    digests = [digest(*arguments)]

    def work() -> None:
        for _ in range(REPEATS):
            digests.append(digest(*arguments))

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(digests) == 1 + THREADS * REPEATS
    print(json.dumps({"digests": sorted(set(digests)), "pool": pool_threads()}))


if __name__ == "__main__":
    main()
