"""Operands of the Triton kernels as they take them, and the sizes of their tiles."""

from types import ModuleType
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from fabric_kernels.packing import CODES_PER_BYTE, DIGITS_PER_BYTE
from fabric_kernels.ternary_matmul.weight import TernaryWeight
from fabric_kernels.triton_call import kernel_module

if TYPE_CHECKING:
    from fabric_kernels.ternary_matmul.triton_gradients import Parts, SumTile
    from fabric_kernels.ternary_matmul.triton_kernels import Tile
    from fabric_kernels.ternary_matmul.triton_quantize import NarrowTile

MULTIPROCESSORS = 132
"""Programs that a large GPU runs at once; smaller ones only take more turns."""
NARROW_STAGE_BYTES = 28 << 10
ENOUGH_PROGRAMS = 60
"""Of high tiles, with which few tokens are as well off as with more low ones."""
LEAST_STEPS = 4
"""Of a part of a product over N: a part is also written and read once."""
FLOATS = ("bfloat16", "float16", "float32")


def kernels() -> tuple[ModuleType, ModuleType]:
    """The kernels on matrix units and the one for few tokens; as ``kernel_module``."""
    return _module("triton_kernels"), _module("triton_few_tokens")


def group_kernels() -> tuple[ModuleType, ModuleType]:
    """Those of a group's input and of its gradients; as ``kernel_module``."""
    return _module("triton_quantize"), _module("triton_gradients")


def batch_kernels() -> ModuleType:
    """Those for tens of tokens; as ``kernel_module``."""
    return _module("triton_batch")


def _module(name: str) -> ModuleType:
    return kernel_module(f"fabric_kernels.ternary_matmul.{name}", "xla or mosaic_gpu")


def check_float(x: jax.Array) -> None:
    """Raises TypeError for a float that matrix units don't take."""
    if x.dtype.name not in FLOATS:
        raise TypeError(f"the Triton kernels take {', '.join(FLOATS)}, found {x.dtype}")


# ---- operands ----------------------------------------------------------------------------------


def stack_of(weight: TernaryWeight) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Bytes uint8 [L, N, W], scale float32 [L] or [1], layer int32 [1]."""
    # Triton's offsets are of 32 bits, signed, and JAX asks for 64 only from 2^32 bytes on.
    if weight.layer is not None and 1 << 31 <= weight.packed.size <= 1 << 32:
        weight = weight.single()
    if weight.layer is None:
        return weight.packed[None], weight.scale.reshape(1), jnp.zeros(1, jnp.int32)
    layer = jnp.asarray(weight.layer).astype(jnp.int32).reshape(1)
    return weight.packed, weight.scale.reshape(-1), layer


def width_of(weight: TernaryWeight) -> int:
    """Bytes of a row."""
    return weight.packed.shape[-1]


def planes_of(rows: jax.Array, weight: TernaryWeight, tokens: int, columns: int) -> jax.Array:
    """Activations [M, K] as [P, M', W'], filled up with zeros to multiples of the last two."""
    m, k = rows.shape
    width = width_of(weight)
    bottom = -m % tokens
    right = -width % columns
    if weight.packing == "ternary2":
        rows = jnp.pad(rows, ((0, bottom), (0, CODES_PER_BYTE * (width + right) - k)))
        return rows.reshape(m + bottom, width + right, CODES_PER_BYTE).transpose(2, 0, 1)
    rows = jnp.pad(rows, ((0, bottom), (0, DIGITS_PER_BYTE * width - k)))
    planes = rows.reshape(m + bottom, DIGITS_PER_BYTE, width).transpose(1, 0, 2)
    return jnp.pad(planes, ((0, 0), (0, 0), (0, right)))


# ---- sizes -------------------------------------------------------------------------------------

# Tiles and their pipelines keep to 96 KiB of shared memory, that of the smaller NVIDIA GPUs since
# Ampere; AMD's compiler buffers a stage less, which comes to half of that.


def product_tile(m: int, n: int, width: int, dtype: jnp.dtype) -> "Tile":
    """Of a product over K."""
    tile = kernels()[0].Tile
    if dtype == jnp.float32:
        return tile(m=min(32, power(m, 16)), n=32, w=32, warps=4, stages=2)
    w = 64 // (dtype.itemsize)
    for tokens, outputs, warps in ((128, 128, 8), (128, 64, 4)):
        if m >= tokens and -(-m // tokens) * -(-n // outputs) >= MULTIPROCESSORS:
            return tile(m=tokens, n=outputs, w=w, warps=warps, stages=2)
    tokens = min(64, power(m, 16))
    return tile(
        m=tokens, n=64, w=min(2 * w, power(width, 32)), warps=4, stages=min(4, 64 // tokens + 1)
    )


def batch_tile(m: int, outputs: list[int], width: int) -> "Tile":
    """Of a product over K of tens of tokens, all of them in a program.

    High ones read the tokens less often, and are for groups that have enough of them. Of the sizes
    that were tried on an H200 for 32 tokens and 2048 to 3584 channels these were the fastest.
    """
    tokens = power(m, 16)
    many = sum(-(-n // 64) for n in outputs) >= ENOUGH_PROGRAMS
    w = min(64 if tokens > 32 else 128, power(width, 32))
    return kernels()[0].Tile(m=tokens, n=64 if many else 16, w=w, warps=4, stages=4)


def transposed_tile(m: int, width: int, dtype: jnp.dtype) -> "Tile":
    """Of a product over N."""
    tile = kernels()[0].Tile
    if dtype == jnp.float32:
        return tile(m=min(32, power(m, 16)), n=32, w=32, warps=4, stages=2)
    if m >= 128 and -(-m // 128) * -(-width // 64) >= MULTIPROCESSORS:
        return tile(m=128, n=64, w=64, warps=8, stages=2)
    return tile(m=min(64, power(m, 16)), n=64, w=32, warps=4, stages=3)


def transposed_parts(m: int, outputs: list[int], width: int, dtype: jnp.dtype) -> "Parts | None":
    """Of products over N with few tokens, cut up along N; None where tiles are enough already."""
    tile = transposed_tile(m, width, dtype)
    tiles = -(-m // tile.m) * -(-width // tile.w)
    if tiles >= MULTIPROCESSORS:
        return None
    steps = [-(-n // tile.n) for n in outputs]
    wanted = -(-2 * MULTIPROCESSORS // tiles)
    # Parts of whole tiles of every matrix need no masks.
    longest = max(LEAST_STEPS, -(-sum(steps) // wanted))
    length = next(
        (c for c in range(longest, 0, -1) if c * 2 > longest and all(s % c == 0 for s in steps)),
        longest,
    )
    return group_kernels()[1].Parts(tile, length)


def narrow_tile(m: int, ranks: list[int], dtype: jnp.dtype) -> "NarrowTile":
    """Of products with a small number of columns, ``ranks``, one adapter to a program."""
    rows = 16 if m < 2048 else 64
    # Bytes of a stage for each of k: A may be float32.
    each = 4 * max(ranks, default=16) + dtype.itemsize * rows
    k = next((k for k in (256, 128, 64) if k * each <= NARROW_STAGE_BYTES), 32)
    return group_kernels()[0].NarrowTile(rows, k)


def sum_tile(m: int, dtype: jnp.dtype) -> "SumTile":
    """Of sums, and of narrow products over tokens."""
    tile = group_kernels()[1].SumTile
    tokens = min(32 if dtype == jnp.float32 else 64, power(m, 16))
    return tile(tokens=tokens) if m < 1024 else tile(m=64, columns=128, tokens=tokens)


def power(value: int, least: int) -> int:
    """The next power of two, at least ``least``."""
    return max(least, 1 << (value - 1).bit_length())
