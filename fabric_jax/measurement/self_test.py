"""A few small products on the default device, every integer compared with numpy's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from fabric_kernels import (
    Packing,
    TernaryWeight,
    pack,
    select_implementation,
    ternary_linear,
    ternary_matmul,
    ternary_matmul_transposed,
)
from fabric_kernels.ternary_matmul import Implementation

EXACT = "exact"
PACKINGS: tuple[Packing, ...] = ("ternary2", "ternary1.6")
# One row (decoding) and several run different kernels; no width fills its last byte.
OUTPUTS, INPUTS, ROWS = 48, 131, 5
SCALE = 0.5


def self_test() -> str:
    """Runs each product, compiled, by the implementation that is picked here and by ``xla``.

    Returns:
        ``exact``, or how many values of which implementation differ.
    """
    wrong: list[str] = []
    picked = select_implementation()
    for implementation in (picked, "xla") if picked != "xla" else (picked,):
        differing, total = _compare(implementation)
        if differing:
            wrong.append(f"{implementation}: {differing} of {total} values differ")
    return "; ".join(wrong) or EXACT


def _compare(implementation: Implementation) -> tuple[int, int]:
    """(values that differ from numpy's, all values) over both packings."""
    random = np.random.default_rng(0)
    codes = random.integers(-1, 2, (OUTPUTS, INPUTS), np.int8)
    inputs = random.integers(-128, 128, (ROWS, INPUTS), np.int8)
    # A largest magnitude of 127 a row makes the quantiser's scale, and those of fixed-point forms
    # of gradients, powers of two: whatever an implementation rounds, these values stay exact.
    floats = np.maximum(inputs, -127).astype(np.float32)
    gradients = random.integers(-127, 128, (ROWS, OUTPUTS)).astype(np.float32)
    floats[:, 0] = gradients[:, 0] = 127
    wide = codes.astype(np.int64)
    sums = inputs.astype(np.int64) @ wide.T
    expected = (sums, sums[:1], gradients @ wide, floats @ wide.T * SCALE, 2 * gradients @ wide)
    differing = total = 0
    for packing in PACKINGS:
        products = jax.jit(partial(_products, packing=packing, implementation=implementation))
        found = products(jnp.asarray(codes), inputs, floats, gradients)
        for one, right in zip(found, expected, strict=True):
            differing += int(np.count_nonzero(np.asarray(one) != right))
            total += right.size
    return differing, total


def _products(
    codes: jax.Array,
    inputs: jax.Array,
    floats: jax.Array,
    gradients: jax.Array,
    *,
    packing: Packing,
    implementation: Implementation,
) -> tuple[jax.Array, ...]:
    """Integer products of all rows and of one, the transposed one, a linear map and its gradient.

    The map is layer 1 of a stack of two, and used twice, as q and k share their input.
    """
    k = codes.shape[1]
    packed = pack(codes, packing)
    stack = jnp.stack([jnp.zeros_like(packed), packed])
    scales = jnp.asarray([0.0, SCALE], jnp.float32)
    weight = TernaryWeight(stack, scales, jnp.ones((), jnp.int32), k, packing)

    def linear(x: jax.Array) -> tuple[jax.Array, ...]:
        return ternary_linear(x, [weight, weight], implementation=implementation)

    (y, _), gradient = jax.vjp(linear, floats)
    dx = gradient((gradients, gradients))[0] / SCALE
    matmul = partial(ternary_matmul, packing=packing, implementation=implementation)
    transposed = ternary_matmul_transposed(
        gradients, packed, k, packing=packing, implementation=implementation
    )
    return matmul(inputs, packed), matmul(inputs[:1], packed), transposed, y, dx
