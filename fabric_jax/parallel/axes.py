"""The one table of what is cut along which axis of a mesh."""

from dataclasses import dataclass

from fabric_jax.parallel.mesh import DATA, FSDP, TENSOR, MeshShape

RULES: dict[str, tuple[str, ...]] = {
    "rows": (DATA, FSDP),
    "features": (TENSOR,),
    "embed": (FSDP,),
    "vocabulary": (),
    "rank": (),
    "layers": (),
}
"""Mesh axes by logical axis. ``features`` are heads and the feed-forward's inner channels,
``embed`` the channels of the residual stream."""

LINEARS: dict[str, tuple[str, str]] = {
    "q": ("features", "embed"),
    "k": ("features", "embed"),
    "v": ("features", "embed"),
    "o": ("embed", "features"),
    "gate": ("features", "embed"),
    "up": ("features", "embed"),
    "down": ("embed", "features"),
}
"""Logical axes of outputs and inputs of each linear."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How the two axes of a matrix are cut.

    Attributes:
        outputs: the mesh axis along which N is cut; None where every device has all of it.
        inputs: the same for K, or for the bytes that hold it.
    """

    outputs: str | None = None
    inputs: str | None = None

    @property
    def axes(self) -> tuple[str | None, str | None]:
        """Outputs, then inputs."""
        return self.outputs, self.inputs


def cut_of(name: str, n: int, width: int, mesh: MeshShape) -> Cut:
    """How the linear ``name`` is stored: [n, width], width in bytes where it is packed.

    An axis that the mesh doesn't divide is left whole.
    """

    def along(logical: str, size: int) -> str | None:
        (axis,) = RULES[logical]
        parts = mesh.size(axis)
        return axis if parts > 1 and size % parts == 0 else None

    outputs, inputs = LINEARS[name]
    return Cut(outputs=along(outputs, n), inputs=along(inputs, width))
