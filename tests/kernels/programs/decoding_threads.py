"""Prints digests of a step of decoding through all layers, taken several times by three threads.

Run as a process: the number of threads of XLA's pool, which NPROC sets, is fixed for a process.
"""

import hashlib
import json
import threading
from functools import partial

import jax
import numpy as np
from fabric_kernels.decoding import decode_layers

from tests.kernels.test_decoding import problem

THREADS, REPEATS = 3, 5


def main() -> None:
    h, stacks, cache, positions, angles = problem(
        (768, 12, 4, 64, 1536), "silu", rows=2, sub_norms=True
    )
    step = jax.jit(partial(decode_layers, angles=angles, implementation="cpu"))
    digests: list[str] = []

    def work() -> None:
        for _ in range(REPEATS):
            total = hashlib.sha256()
            for leaf in jax.tree.leaves(step(h, stacks, cache, positions)):
                total.update(np.asarray(leaf).tobytes())
            digests.append(total.hexdigest())

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(digests) == THREADS * REPEATS
    print(json.dumps(sorted(set(digests))))


if __name__ == "__main__":
    main()
