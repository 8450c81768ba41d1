"""Products with packed matrices in programs that XLA divides among devices (``jit``, Shardy).

XLA can't look into the calls of kernels, and would gather their operands; nor would it leave packed
bytes where they are around a product that it can look into. So it is told how each product of
``select.Products`` is divided (``jax.experimental.custom_partitioning``), by where the packed
matrices and the rows lie:

- rows cut: each device has its own;
- N cut: each device has its outputs; gradients by the input are added up;
- K cut: each device quantises its channels with the absmax of all, and adds up int32 sums.

So integers, and the outputs that are made of them, are those of one device, bit for bit. On one
device, and within ``shard_map``, a product is what it would be without this module. Axes of the
mesh are ``AxisType.Auto``; ``Explicit`` ones do where JAX can type the product by itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import SdyShardingRule, custom_partitioning
from jax.sharding import Mesh

from fabric_kernels.ternary_matmul.cuts import (
    Cut,
    Geometry,
    Labels,
    decide,
    expanded,
    placed,
    sharding_rule,
)


@dataclass(frozen=True, kw_only=True)
class Divisible:
    """A product that can be divided.

    Attributes:
        run: ``run(cut, rows, fixed)``, on one device, or where ``cut`` is not None on this device's
            parts. Rows are arrays with the same leading axes.
        labels: of rows and of fixed arguments, in trees like theirs.
        results: labels of the results' leaves. More of them are rows for a backward pass, whose
            last axis is the implementation's affair.
        geometry: of the matrices.
        matrices: how many.
        sums_rows: whether some results are sums over rows.
    """

    run: Callable[[Cut | None, Any, Any], Any]
    labels: tuple[Any, Any]
    results: tuple[str, ...]
    geometry: Geometry
    matrices: int
    sums_rows: bool = False


def divided(product: Divisible, rows: Any, fixed: Any) -> Any:
    """The product, whatever divides its arguments."""

    @custom_vmap
    def call(rows: Any, fixed: Any) -> Any:
        return _partitioned(product, rows, fixed)

    def rule(size: int, batched: Any, rows: Any, fixed: Any) -> tuple[Any, Any]:
        if product.sums_rows or any(jax.tree.leaves(batched[1])):
            leaves, tree = jax.tree.flatten((rows, fixed))
            axes = [0 if one else None for one in jax.tree.leaves(batched)]

            def flat(*leaves: Any) -> Any:
                return product.run(None, *jax.tree.unflatten(tree, leaves))

            out = jax.vmap(flat, in_axes=axes)(*leaves)
        else:
            # A mapped axis of the rows is one more of theirs.
            whole = jax.tree.map(
                lambda a, b: a if b else jnp.broadcast_to(a, (size, *a.shape)), rows, batched[0]
            )
            out = divided(product, whole, fixed)
        return out, jax.tree.map(lambda _: True, out)

    call.def_vmap(rule)
    return call(rows, fixed)


def _partitioned(product: Divisible, rows: Any, fixed: Any) -> Any:
    if jax.sharding.get_abstract_mesh().manual_axes:
        # Within shard_map these are a device's own. Along axes that it leaves to XLA there is no
        # rule: the partitioner doesn't tell their names.
        return product.run(None, rows, fixed)
    names, leaves = jax.tree.leaves(product.labels), jax.tree.leaves((rows, fixed))
    own = [expanded(name, leaf.ndim) for name, leaf in zip(names, leaves, strict=True)]

    def whole(rows: Any, fixed: Any) -> Any:
        return product.run(None, rows, fixed)

    def rule(_: Mesh, operands: Sequence[Any], results: Sequence[Any]) -> SdyShardingRule:
        del operands
        return sharding_rule(own, _result_labels(product, results), product.geometry)

    call = custom_partitioning(whole)
    call.def_partition(partial(_partition, product, own), sharding_rule=rule)
    return call(rows, fixed)


def _result_labels(product: Divisible, results: Sequence[Any]) -> list[Labels]:
    """Of the results' leaves, each of which has a shape."""
    kept = (f"... kept{i}" for i in range(len(results) - len(product.results)))
    names = (*product.results, *kept)
    return [expanded(name, len(one.shape)) for name, one in zip(names, results, strict=True)]


def _partition(
    product: Divisible, own: Sequence[Labels], mesh: Mesh, arguments: Any, results: Any
) -> tuple[Mesh, Callable[..., Any], Any, Any]:
    """What a device computes, and how results and arguments have to lie for it.

    Arguments and results are shapes with the shardings that XLA would choose.
    """
    leaves, tree = jax.tree.flatten(arguments)
    arrays = list(zip(own, leaves, strict=True))
    cut, axes = decide(mesh, arrays, product.matrices, product.geometry)
    wanted, out_tree = jax.tree.flatten(results)
    labels = _result_labels(product, wanted)
    sizes = [
        one.shape[-1] if "kept" in name[-1] else None
        for name, one in zip(labels, wanted, strict=True)
    ]

    def lower(rows: Any, fixed: Any) -> Any:
        out = jax.tree.leaves(product.run(cut, rows, fixed))
        return out_tree.unflatten(map(_fitted, out, sizes))

    return (
        mesh,
        lower,
        out_tree.unflatten([placed(mesh, one, axes) for one in labels]),
        tree.unflatten([placed(mesh, one, axes) for one in own]),
    )


def _fitted(x: jax.Array, last: int | None) -> jax.Array:
    """With a last axis of that size: kernels fill it up as it suits their number of rows."""
    if last is None or x.shape[-1] == last:
        return x
    x = x[..., :last]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, last - x.shape[-1])])
