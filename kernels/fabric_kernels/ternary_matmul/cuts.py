"""How a product with packed matrices is divided among the devices of a mesh.

Axes of arrays have labels: ``n0`` the outputs of the first matrix, ``w`` the bytes of a row, ``k``
channels, ``b0`` the first axis of rows, and others that are never cut. What a mesh's axes cut is
decided by label, packed matrices first: they stay where they lie, and the rest follows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fabric_kernels.packing import CODES_PER_BYTE, Packing
from fabric_kernels.ternary_matmul.weight import TernaryWeight

Labels = tuple[str, ...]
_Axes = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What matrices of one call have in common.

    Attributes:
        k: K.
        width: bytes of a row.
        packing: of the bytes.
    """

    k: int
    width: int
    packing: Packing

    @staticmethod
    def of(weight: TernaryWeight) -> "Geometry":
        """A matrix's."""
        return Geometry(k=weight.k, width=weight.packed.shape[-1], packing=weight.packing)

    @property
    def contiguous(self) -> bool:
        """Whether consecutive bytes hold consecutive channels, so that both are cut alike."""
        return self.packing == "ternary2" and self.k == self.width * CODES_PER_BYTE


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What lies along which axes of a mesh.

    Attributes:
        inputs: axes that cut K of all matrices.
        parts: devices along them.
        outputs: axes that cut N, for each matrix.
        rows: axes that cut rows.
        geometry: of the whole matrices.
    """

    inputs: _Axes
    parts: int
    outputs: tuple[_Axes, ...]
    rows: _Axes
    geometry: Geometry

    @property
    def any_outputs(self) -> _Axes:
        """Axes that cut N of some matrix."""
        return tuple(dict.fromkeys(axis for axes in self.outputs for axis in axes))


def expanded(label: str, ndim: int) -> Labels:
    """The labels of an array's axes; ``...`` stands for those of rows."""
    words = label.split()
    if "..." not in words:
        return tuple(words)
    rest = [word for word in words if word != "..."]
    return (*(f"b{i}" for i in range(ndim - len(rest))), *rest)


def sharding_rule(
    operands: Sequence[Labels], results: Sequence[Labels], geometry: Geometry
) -> SdyShardingRule:
    """The same for Shardy, which decides where shardings spread to.

    ``k`` is ``w`` bytes of four codes where both are cut alike.
    """
    together = geometry.contiguous

    def factors(label: str) -> tuple[str, ...]:
        return ("w", "c") if label == "k" and together else (label,)

    def mapping(labels: Labels) -> ArrayMapping:
        dims = (factors(label) for label in labels)
        return ArrayMapping(*(d[0] if len(d) == 1 else CompoundFactor(*d) for d in dims))

    # In the order in which they are met, as Shardy wants them.
    every = [f for one in (*operands, *results) for label in one for f in factors(label)]
    whole = tuple(f for f in dict.fromkeys(every) if f[0] not in "bnw")
    sizes = {"c": CODES_PER_BYTE} if "c" in every else {}
    return SdyShardingRule(
        tuple(map(mapping, operands)),
        tuple(map(mapping, results)),
        need_replication_factors=whole,
        **cast(Any, sizes),
    )


def decide(
    mesh: Mesh, arrays: Sequence[tuple[Labels, Any]], count: int, geometry: Geometry
) -> tuple[Cut, dict[str, _Axes]]:
    """The cut of a call with ``count`` matrices, and by label.

    An axis of the mesh that the bytes of a matrix lie along cuts nothing else; those of one call
    are cut alike along K, as the first that is. Uneven parts are not made.

    Args:
        mesh: of the devices.
        arrays: labels, and shape and sharding, of all arguments.
        count: how many matrices.
        geometry: theirs.
    """
    axes: dict[str, _Axes] = {}

    def take(label: str, taken: set[str]) -> _Axes:
        for labels, array in arrays:
            if label not in labels:
                continue
            place = labels.index(label)
            found = tuple(a for a in _axes_of(array.sharding, place) if a not in taken)
            parts = _devices(mesh, found)
            if parts > 1 and array.shape[place] % parts == 0:
                axes[label] = found
                return found
        return ()

    inputs = take("w", set())
    outputs = tuple(take(f"n{i}", set(inputs)) for i in range(count))
    taken = set(inputs).union(*outputs)
    rows: _Axes = ()
    for i in range(max(sum(label[0] == "b" for label in labels) for labels, _ in arrays)):
        rows += take(f"b{i}", taken.union(rows))
    if geometry.contiguous:
        axes["k"] = inputs
    cut = Cut(
        inputs=inputs,
        parts=_devices(mesh, inputs),
        outputs=outputs,
        rows=rows,
        geometry=geometry,
    )
    return cut, axes


def placed(mesh: Mesh, labels: Labels, axes: Mapping[str, _Axes]) -> NamedSharding:
    """The sharding of an array by the labels of its axes."""
    return NamedSharding(mesh, PartitionSpec(*(axes.get(label) or None for label in labels)))


def _devices(mesh: Mesh, axes: _Axes) -> int:
    sizes = dict(mesh.shape)
    count = 1
    for axis in axes:
        count *= sizes[axis]
    return count


def _axes_of(sharding: jax.sharding.Sharding, place: int) -> _Axes:
    if not isinstance(sharding, NamedSharding):
        raise TypeError(f"ternary products are divided by NamedSharding, found {sharding}")
    spec = sharding.spec
    names = spec[place] if place < len(spec) else None
    if names is None:
        return ()
    return names if isinstance(names, tuple) else (names,)
