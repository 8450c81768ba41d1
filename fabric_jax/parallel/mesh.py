"""Meshes: how many devices lie along each of three named axes."""

import math
from dataclasses import dataclass

import jax
from jax.sharding import AxisType, Mesh

from fabric_jax.errors import FabricError, unknown_name

DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
"""Rows are cut along ``data`` and ``fsdp``; frozen weights along ``fsdp``, gathered layer by layer,
and along ``tensor``, where each device computes its part of the products."""


@dataclass(frozen=True, kw_only=True)
class MeshShape:
    """How many devices lie along each axis.

    Attributes:
        data: each has rows of its own and all of what the other axes leave of the weights.
        fsdp: the same rows as ``data``, but a part of the weights.
        tensor: all rows, and a part of each matrix that it multiplies by.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        """Refuses sizes that can't be meant."""
        for name in AXES:
            if getattr(self, name) < 1:
                raise FabricError(
                    f"mesh axis {name} out of range",
                    expected="1 or more",
                    found=str(getattr(self, name)),
                )

    def __str__(self) -> str:
        """``data=4,fsdp=2``: the axes with more than one device, ``data`` where there is none."""
        sizes = {name: self.size(name) for name in AXES}
        long = {name: size for name, size in sizes.items() if size > 1} or {DATA: 1}
        return ",".join(f"{name}={size}" for name, size in long.items())

    def size(self, axis: str | None) -> int:
        """Devices along an axis; 1 for None."""
        return 1 if axis is None else getattr(self, axis)

    @property
    def devices(self) -> int:
        """Devices in all."""
        return math.prod(self.size(name) for name in AXES)

    @property
    def row_shards(self) -> int:
        """Parts that the rows of a batch are cut into."""
        return self.data * self.fsdp

    def require_rows(self, rows: int) -> None:
        """Raises FabricError where the rows of a batch can't be cut evenly."""
        if rows % self.row_shards:
            raise FabricError(
                f"{rows} rows in a batch can't be cut along the mesh {self}",
                expected=f"a batch size divisible by data · fsdp = {self.row_shards}",
                found=str(rows),
            )


def parse_mesh(text: str, devices: int | None) -> MeshShape:
    """The mesh that ``data=4,fsdp=2,tensor=2`` names; all devices along ``data`` for no text.

    An axis that is left out has one device. ``devices`` are those that there are; None for a mesh
    that is only thought of.

    Raises:
        FabricError: an axis is unknown, named twice or without a number, or the product is not
            ``devices``.
    """
    if not text:
        return MeshShape(data=devices or 1)
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = (word.strip() for word in part.partition("="))
        if name not in AXES:
            raise unknown_name("mesh axis", name, AXES)
        if name in sizes:
            raise FabricError(f"the mesh {text!r} names {name} twice")
        if not number.isascii() or not number.isdigit():
            raise FabricError(
                f"the mesh {text!r} gives {name} no number of devices",
                expected="axes like data=4,fsdp=2",
                found=part.strip(),
            )
        sizes[name] = int(number)
    shape = MeshShape(**sizes)
    if devices is not None and shape.devices != devices:
        raise FabricError(
            f"the mesh {text!r} has {shape.devices} devices",
            expected=f"a product of {devices}, the number of devices there are",
            fix="Leave --mesh out to use all of them along data",
        )
    return shape


def named_mesh(text: str) -> Mesh | None:
    """The mesh of all devices that ``text`` names; None for no text, and for one device.

    Raises:
        FabricError: as :func:`parse_mesh`.
    """
    if not text:
        return None
    shape = parse_mesh(text, jax.device_count())
    return None if shape.devices == 1 else make_mesh(shape)


def make_mesh(shape: MeshShape) -> Mesh:
    """The first devices of all processes, in an order that suits their links."""
    sizes = tuple(shape.size(name) for name in AXES)
    devices = jax.devices()[: shape.devices]
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
