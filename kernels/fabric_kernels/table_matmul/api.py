"""Products of activations with a table [N, K] that is stored in its own dtype.

XLA on CPU would widen a whole half-precision table to float32 beside it, and hoists that copy out
of any loop over tiles; the kernel widens panels that fit the cache. Elsewhere large tables, and
everywhere those of integers, are taken by tiles of rows.
"""

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from fabric_kernels import cpu_library
from fabric_kernels.block_quantization import BlockTable
from fabric_kernels.nvidia import AMPERE, compute_capability
from fabric_kernels.table_matmul import triton, xla
from fabric_kernels.table_matmul.quantized import block_product, block_transposed

Implementation = Literal["xla", "cpu", "triton"]
FEW_ROWS = 16
CPU_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def table_matmul(
    x: jax.Array, table: jax.Array | BlockTable, *, implementation: Implementation | None = None
) -> jax.Array:
    """``x[..., K] · table[N, K]^T`` as float32 [..., N].

    The table is multiplied as it is; with a float32 ``x`` nothing is rounded before the product.
    Differentiable in both; the gradient by the table is a dense [N, K], or zero where the table is
    one of integers, which are frozen.

    Args:
        x: [..., K], floats.
        table: [N, K], floats or quantised. Quantised rows are multiplied in the dtype of ``x``, and
            at most 8 MiB of them exist as floats at once.
        implementation: ``cpu``, ``triton`` (of few rows in half precision) or ``xla``; None picks.
            A named one runs or raises.

    Raises:
        ValueError: the shapes do not fit, or the implementation is unknown or has no product with
            such a table.
    """
    _check(x, table, 1)
    if isinstance(table, BlockTable):
        return block_product(_codes_on_cpu(x, table, implementation), x, table)
    return _product(_chosen(x, table, implementation), x, table)


def table_matmul_transposed(
    g: jax.Array, table: jax.Array | BlockTable, *, implementation: Implementation | None = None
) -> jax.Array:
    """``g[..., N] · table[N, K]`` as float32 [..., K]; otherwise as :func:`table_matmul`."""
    _check(g, table, 0)
    if isinstance(table, BlockTable):
        _check_quantized(table, implementation)
        return block_transposed(g, table)
    return _transposed(_chosen(g, table, implementation), g, table)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(chosen: Implementation, x: jax.Array, table: jax.Array) -> jax.Array:
    if chosen == "triton":
        return triton.product(x, table)
    if chosen == "xla":
        return xla.product(x, table)
    out = jax.ShapeDtypeStruct((*x.shape[:-1], table.shape[0]), jnp.float32)
    call = jax.ffi.ffi_call("fabric_table", out, vmap_method="sequential")
    return call(x.astype(jnp.float32), table)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _transposed(chosen: Implementation, g: jax.Array, table: jax.Array) -> jax.Array:
    if chosen == "triton":
        return triton.transposed(g, table)
    if chosen == "xla":
        return xla.transposed(g, table)
    out = jax.ShapeDtypeStruct((*g.shape[:-1], table.shape[1]), jnp.float32)
    call = jax.ffi.ffi_call("fabric_table_transposed", out, vmap_method="sequential")
    return call(g.astype(jnp.float32), table)


_Pair = tuple[jax.Array, jax.Array]


def _product_fwd(chosen: Implementation, x: jax.Array, table: jax.Array) -> tuple[jax.Array, _Pair]:
    return _product(chosen, x, table), (x, table)


def _product_bwd(chosen: Implementation, residuals: _Pair, g: jax.Array) -> _Pair:
    x, table = residuals
    dx: jax.Array = _transposed(chosen, g.astype(x.dtype), table)
    return dx.astype(x.dtype), _outer(g, x).astype(table.dtype)


def _transposed_fwd(
    chosen: Implementation, g: jax.Array, table: jax.Array
) -> tuple[jax.Array, _Pair]:
    return _transposed(chosen, g, table), (g, table)


def _transposed_bwd(chosen: Implementation, residuals: _Pair, h: jax.Array) -> _Pair:
    g, table = residuals
    dg: jax.Array = _product(chosen, h.astype(g.dtype), table)
    return dg.astype(g.dtype), _outer(g, h).astype(table.dtype)


_product.defvjp(_product_fwd, _product_bwd)
_transposed.defvjp(_transposed_fwd, _transposed_bwd)


def _outer(left: jax.Array, right: jax.Array) -> jax.Array:
    """``left[..., n]^T · right[..., k]``, [n, k], summed over rows in float32."""
    rows = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
    return lax.dot_general(
        rows[0].astype(jnp.float32),
        rows[1].astype(jnp.float32),
        (((0,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST,
    )


def _chosen(
    x: jax.Array, table: jax.Array, implementation: Implementation | None
) -> Implementation:
    """What runs the product; None means Triton on an NVIDIA GPU that has bfloat16."""
    if implementation == "triton":
        if not triton.takes(x, table):
            raise ValueError(
                f"the Triton product takes two to {triton.MOST_ROWS} rows in half precision and a "
                f"table of floats; found {x.dtype} {list(x.shape)} and {table.dtype}"
            )
        return "triton"
    if implementation is None and compute_capability() >= AMPERE and triton.takes(x, table):
        return "triton"
    return "cpu" if _on_cpu(table, implementation) else "xla"


def _on_cpu(table: jax.Array, implementation: Implementation | None) -> bool:
    if implementation is None:
        # A dtype that the kernel doesn't know is no reason to fail where nobody asked for it.
        known = any(table.dtype == dtype for dtype in CPU_DTYPES)
        if not (known and jax.default_backend() == "cpu" and cpu_library.available()):
            return False
        cpu_library.load()
        return True
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"table_matmul has the implementations {', '.join(get_args(Implementation))}; "
            f"found {implementation!r}"
        )
    if implementation == "cpu":
        cpu_library.load()
    return implementation == "cpu"


def _codes_on_cpu(x: jax.Array, table: BlockTable, implementation: Implementation | None) -> bool:
    """Whether the kernel for a few rows and int8 codes runs; more rows are better off tiled."""
    if implementation == "cpu" and table.bits == 8:
        table.check()
        return _on_cpu(table.scales, implementation)
    _check_quantized(table, implementation)
    few = x.size // max(1, x.shape[-1]) <= FEW_ROWS
    return few and table.bits == 8 and implementation is None and _on_cpu(table.scales, None)


def _check_quantized(table: BlockTable, implementation: Implementation | None) -> None:
    table.check()
    if implementation not in (None, "xla"):
        raise ValueError(
            "products with a quantised table have the implementation xla, and cpu where they are "
            f"forward ones with int8 codes; found {implementation!r}"
        )


def _check(x: jax.Array, table: jax.Array | BlockTable, axis: int) -> None:
    if len(table.shape) != 2 or x.shape[-1] != table.shape[axis]:
        raise ValueError(
            f"the last axis of x and axis {axis} of a table [N, K] are contracted, "
            f"found {list(x.shape)} and {list(table.shape)}"
        )
