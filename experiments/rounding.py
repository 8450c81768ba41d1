"""Do products of equal inputs round on this device as float32 does in numpy?

Counts of activation scales, codes and outputs of each implementation that differ from the rule of
``fabric_kernels.absmax``, computed in numpy, for random rows whose sizes differ by factors of up to
400.

    python -m experiments.rounding --output rounding.json

Twenty seconds on a GPU.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from fabric_kernels import TernaryWeight, absmax_quantize, pack, ternary_linear
from numpy.typing import NDArray

from fabric_jax.files import write_json

SHAPES = ((128, 512, 512), (128, 384, 256), (2048, 1024, 512))
"""Rows, outputs and inputs."""
IMPLEMENTATIONS = ("xla", "triton", "mosaic_gpu", "tuned")
WEIGHT_SCALE = np.float32(0.0163)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints and writes a line for each dtype and shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="")
    options = parser.parse_args(arguments)
    record = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "command": "python -m experiments.rounding",
        "differ_from_numpy": [
            differences(dtype, *shape) for dtype in ("float32", "bfloat16") for shape in SHAPES
        ],
    }
    print(json.dumps(record, indent=2))
    if options.output:
        write_json(options.output, record)
    return 0


def differences(dtype: str, rows: int, n: int, k: int) -> dict[str, Any]:
    """How many scales, codes and outputs of a product [rows, k] by [n, k] are other numbers."""
    random = np.random.default_rng(rows)
    spread = np.exp(random.uniform(-3, 3, (rows, 1)))
    x = jnp.asarray(random.standard_normal((rows, k)) * spread, dtype)
    codes = random.integers(-1, 2, (n, k)).astype(np.int8)
    own, by_token = numpy_codes(np.asarray(x, np.float32))
    sums = (own.astype(np.int64) @ codes.T.astype(np.int64)).astype(np.float32)
    expected = jnp.asarray(sums * (np.float32(1) / by_token * WEIGHT_SCALE)).astype(dtype)
    found, scale = jax.jit(absmax_quantize)(x)
    line: dict[str, Any] = {"dtype": dtype, "rows": rows, "n": n, "k": k, "outputs": rows * n}
    line["xla_scales"] = _unequal(scale, by_token)
    line["xla_codes"] = _unequal(found, own)
    packed = pack(jnp.asarray(codes), "ternary2")
    weight = TernaryWeight(packed, jnp.float32(WEIGHT_SCALE), None, k, "ternary2")
    for name in IMPLEMENTATIONS:
        chosen: Any = name
        try:
            (y,) = jax.jit(partial(ternary_linear, implementation=chosen))(x, (weight,))
        except ValueError as error:  # it does not run on this device
            line[name] = str(error)[:80]
        else:
            line[name] = _unequal(y, expected)
    return line


def numpy_codes(x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Codes as floats, and the scale that divides them, every operation rounded correctly."""
    largest = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-5))
    scale = (np.float32(1) / largest * np.float32(127)).astype(np.float32)
    return np.clip(np.rint(x * scale), -128, 127).astype(np.float32), scale


def _unequal(found: Any, expected: Any) -> int:
    return int((np.asarray(found, np.float32) != np.asarray(expected, np.float32)).sum())


if __name__ == "__main__":
    sys.exit(main())
