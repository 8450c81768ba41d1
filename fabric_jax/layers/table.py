"""Embedding and head tables: floats in one parameter, or integers with scales in two."""

import jax
import jax.numpy as jnp
from fabric_kernels import BlockTable, dequantize_blocks
from fabric_kernels.block_quantization import TableBits, code_bytes, groups
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from fabric_jax.layers.parameters import (
    BaseParam,
    Constant,
    Normal,
    NormalCodes,
    declare_base,
    normal_scale,
)


class QuantizedTable(nnx.Module):
    """A frozen table [N, K] of int8 or int4 codes and float16 scales, one for each 32 of a row."""

    def __init__(self, n: int, k: int, bits: TableBits, std: float) -> None:
        """Declares ``codes`` and ``scales``; random ones stand for a Gaussian of ``std``."""
        self.codes, self.scales = declare_blocks(n, k, bits, std)
        self.k = k

    def value(self) -> BlockTable:
        """What products take."""
        return BlockTable(self.codes[...], self.scales[...], self.k)


def declare_blocks(
    n: int, k: int, bits: TableBits, std: float, *, stack: tuple[int, ...] = ()
) -> tuple[BaseParam, BaseParam]:
    """Codes and scales of a matrix [n, k] in each layer of ``stack``; Gaussian if random."""
    dtype = jnp.int8 if bits == 8 else jnp.uint8
    codes = declare_base((n, code_bytes(k, bits)), dtype, NormalCodes(k, bits), stack=stack)
    scale = Constant(normal_scale(std, bits))
    return codes, declare_base((n, groups(k)), jnp.float16, scale, stack=stack)


def table_bits(dtype: DTypeLike) -> TableBits | None:
    """Bits of the codes of a table stored as ``int8`` or ``int4``; None for floats."""
    match jnp.dtype(dtype).name:
        case "int8":
            return 8
        case "int4":
            return 4
        case _:
            return None


def declare_table(
    shape: tuple[int, int], dtype: DTypeLike, std: float
) -> BaseParam | QuantizedTable:
    """A table [N, K] in the dtype, quantised for ``int8`` and ``int4``; Gaussian if random."""
    bits = table_bits(dtype)
    if bits is not None:
        return QuantizedTable(*shape, bits, std)
    return declare_base(shape, dtype, Normal(std))


def table_value(table: BaseParam | QuantizedTable) -> Float[Array, "N K"] | BlockTable:
    """What ``table_matmul`` takes."""
    return table.value() if isinstance(table, QuantizedTable) else table[...]


def table_rows(
    table: BaseParam | QuantizedTable, indices: Int32[Array, "*batch"], dtype: DTypeLike
) -> Float[Array, "*batch K"]:
    """Some rows in ``dtype``; of a quantised table only these are made floats."""
    value: jax.Array | BlockTable = table_value(table)
    if isinstance(value, BlockTable):
        return dequantize_blocks(value.rows(indices), dtype)
    stored: jax.Array = value
    if value.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        # There XLA takes its rows from a table in float32 (jaxlib 0.10), and would widen all of it
        # before a loop that knows the indices. So it is told that the table depends on them.
        stored, indices = lax.optimization_barrier((stored, indices))
    return stored[indices].astype(dtype)
