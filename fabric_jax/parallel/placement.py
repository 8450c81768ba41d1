"""Where the arrays of a job lie on a mesh: partition specs of trees, and putting trees there."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fabric_jax.parallel.axes import LINEARS, RULES, cut_of
from fabric_jax.parallel.mesh import AXES, MeshShape

WHOLE = PartitionSpec()
ROWS = PartitionSpec(RULES["rows"])
"""Of arrays [B, ...]."""
MICRO_BATCHES = PartitionSpec(None, RULES["rows"])
"""Of arrays [A, B, ...]."""


def shape_of(mesh: Mesh) -> MeshShape:
    """How many devices lie along each axis."""
    return MeshShape(**{name: mesh.shape[name] for name in AXES})


def base_specs(tree: Any, mesh: MeshShape, *, ternary: bool) -> Any:
    """A spec for each leaf of a base tree, or of an optimizer's state for one.

    The stacks [L, N, W] of ternary linears are cut on both axes as ``parallel.axes`` says; all else
    is whole on every device.

    Args:
        tree: of arrays or ``ShapeDtypeStruct``.
        mesh: what to cut along.
        ternary: whether the linears are packed codes or masters; plain floats are not cut.
    """

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        name, last = ("", "", *map(_key, path))[-2:]
        if not ternary or last != "weight" or name not in LINEARS or len(leaf.shape) < 2:
            return WHOLE
        *stack, n, width = leaf.shape
        return PartitionSpec(*[None] * len(stack), *cut_of(name, n, width, mesh).axes)

    return jax.tree_util.tree_map_with_path(spec, tree)


def spread_specs(tree: Any, mesh: MeshShape) -> Any:
    """A spec for each leaf that cuts its longest axis over all devices that have other rows.

    For adapters and moments, which are elementwise state: the axis is one that the devices divide;
    what has none stays whole.
    """
    parts = mesh.row_shards

    def spec(leaf: Any) -> PartitionSpec:
        axes = [i for i, size in enumerate(leaf.shape) if size and size % parts == 0]
        if parts == 1 or not axes:
            return WHOLE
        longest = max(axes, key=lambda i: leaf.shape[i])
        return PartitionSpec(*[None] * longest, RULES["rows"])

    return jax.tree.map(spec, tree)


def shardings(mesh: Mesh, specs: Any) -> Any:
    """The shardings that specs mean on a mesh."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )


def bytes_on_device(tree: Any, specs: Any, mesh: MeshShape) -> int:
    """Bytes of a tree on each device."""

    def one(leaf: Any, spec: PartitionSpec) -> int:
        parts = 1
        for names in spec:
            for name in (names,) if isinstance(names, str) else names or ():
                parts *= mesh.size(name)
        return leaf.size * leaf.dtype.itemsize // parts

    return sum(jax.tree.leaves(jax.tree.map(one, tree, specs)))


def uncut_linears(tree: Any, mesh: MeshShape) -> list[str]:
    """A phrase for each axis of a linear that the mesh would cut and doesn't divide."""
    found: list[str] = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name, last = ("", "", *map(_key, path))[-2:]
        if last != "weight" or name not in LINEARS:
            continue
        n, width = leaf.shape[-2:]
        sides = zip(
            LINEARS[name],
            ("outputs", "inputs"),
            cut_of(name, n, width, mesh).axes,
            (n, width),
            strict=True,
        )
        for logical, axis, kept, size in sides:
            (along,) = RULES[logical]
            if kept is None and mesh.size(along) > 1:
                found.append(f"{name}: {size} along its {axis} is not cut by {along}")
    return found


def place_rows(batch: Any, rows: int, mesh: Mesh, spec: PartitionSpec = MICRO_BATCHES) -> Any:
    """This process's rows of a batch as global arrays.

    Args:
        batch: the rows that ``own_rows`` says.
        rows: B of the whole batch.
        mesh: where they go.
        spec: how the axes are cut.
    """
    sharding = NamedSharding(mesh, spec)
    axis = len(spec) - 1

    def one(part: Any) -> jax.Array:
        local = np.asarray(part)
        shape = (*local.shape[:axis], rows, *local.shape[axis + 1 :])
        return jax.make_array_from_process_local_data(sharding, local, shape)

    return jax.tree.map(one, batch)


def own_rows(rows: int, mesh: Mesh) -> tuple[int, int]:
    """First and last + 1 of the rows of a micro-batch that this process's devices compute."""
    sharding = NamedSharding(mesh, PartitionSpec(*MICRO_BATCHES[1:]))
    slices = sharding.addressable_devices_indices_map((rows,)).values()
    bounds = [part[0].indices(rows) for part in slices if part is not None]
    return min(bound[0] for bound in bounds), max(bound[1] for bound in bounds)


def place(tree: Any, where: Any) -> Any:
    """Arrays that every process has whole, leaf by leaf on their shardings."""

    def one(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(one, tree, where)


def place_whole(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every device has whole."""
    return place(tree, jax.tree.map(lambda _: NamedSharding(mesh, WHOLE), tree))


def assembling(devices: int) -> AbstractContextManager[None]:
    """Where weights are put together: in the host's memory if they are cut along a mesh after."""
    if devices == 1:
        return nullcontext()
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def abstract(tree: Any, where: Any) -> Any:
    """Shapes with their shardings, for compiling before there are arrays."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        where,
    )


def _key(part: Any) -> str:
    return str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", ""))))
