"""Exact zero-padding of models whose rows don't divide into blocks of 256 weights.

Channels that are zero everywhere change nothing but two factors, which norms and queries make up
for (H query heads, hidden width D, feed-forward width F, head width hd; a prime marks the padded):

- an RMSNorm over D' takes the mean of D' squares, so its gains are multiplied by sqrt(D / D'), and
  likewise for the norms over H·hd and F;
- the runtime divides scores by sqrt(hd'), so the scale of q is multiplied by sqrt(hd' / hd).

Rotary positions turn the first hd channels of each head only. What remains is that the epsilon of a
norm counts D' / D times.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from fabric_jax.checkpoints.arrays import HostArray
from fabric_jax.checkpoints.gguf.codecs import BLOCK
from fabric_jax.checkpoints.source import TernaryMatrix
from fabric_jax.checkpoints.ternary import pack_codes, unpack_codes
from fabric_jax.errors import FabricError
from fabric_jax.models.config import ModelConfig

Axis = Literal["hidden", "ffn", "heads", "kv_heads", "rank", "vocabulary"]
LINEAR_AXES: dict[str, tuple[Axis, Axis]] = {
    "attention.q": ("heads", "hidden"),
    "attention.k": ("kv_heads", "hidden"),
    "attention.v": ("kv_heads", "hidden"),
    "attention.o": ("hidden", "heads"),
    "mlp.gate": ("ffn", "hidden"),
    "mlp.up": ("ffn", "hidden"),
    "mlp.down": ("hidden", "ffn"),
}
NORM_AXES: dict[str, Axis] = {
    "final_norm.gain": "hidden",
    "layers.attention_norm.gain": "hidden",
    "layers.attention.sub_norm.gain": "heads",
    "layers.mlp_norm.gain": "hidden",
    "layers.mlp.sub_norm.gain": "ffn",
}
PREFIX = "fabric_jax.padding."


@dataclass(frozen=True, kw_only=True)
class Padding:
    """The widths of a model, before and after.

    Attributes:
        config: the model as it is.
        hidden_size: D'.
        ffn_size: F'.
        head_dim: hd'.
    """

    config: ModelConfig
    hidden_size: int
    ffn_size: int
    head_dim: int

    @property
    def padded(self) -> ModelConfig:
        """The model as the file has it."""
        widths = {name: getattr(self, name) for name in ("hidden_size", "ffn_size", "head_dim")}
        return replace(self.config, **widths)

    @property
    def query_factor(self) -> float:
        """On the scale of q."""
        return math.sqrt(self.head_dim / self.config.head_dim)

    def gain_factor(self, axis: Axis) -> float:
        """On the gains of a norm over an axis."""
        _, old, new = self.sizes(axis)
        return math.sqrt(old / new)

    def sizes(self, axis: Axis) -> tuple[int, int, int]:
        """(groups, width, padded width): each of the groups is padded at its end."""
        config = self.config
        match axis:
            case "hidden":
                return 1, config.hidden_size, self.hidden_size
            case "ffn":
                return 1, config.ffn_size, self.ffn_size
            case "heads":
                return config.num_heads, config.head_dim, self.head_dim
            case "kv_heads":
                return config.num_kv_heads, config.head_dim, self.head_dim
            case "rank" | "vocabulary":
                return 1, 1, 1

    def widen(self, array: HostArray, axes: tuple[Axis, ...]) -> HostArray:
        """An array with zeros in the new channels of its axes."""
        for number, axis in enumerate(axes):
            groups, old, new = self.sizes(axis)
            if new == old:
                continue
            shape = array.shape
            parts = array.reshape(*shape[:number], groups, old, *shape[number + 1 :])
            room = [(0, 0)] * parts.ndim
            room[number + 1] = (0, new - old)
            parts = np.pad(parts, room)
            array = parts.reshape(*shape[:number], groups * new, *shape[number + 1 :])
        return array

    def narrow(self, array: HostArray, axes: tuple[Axis, ...]) -> HostArray:
        """The inverse of :meth:`widen`.

        Raises:
            FabricError: the channels to be left out are not zero.
        """
        for number, axis in enumerate(axes):
            groups, old, new = self.sizes(axis)
            if new == old:
                continue
            shape = array.shape
            parts = array.reshape(*shape[:number], groups, new, *shape[number + 1 :])
            parts = np.moveaxis(parts, number + 1, 0)
            if parts[old:].any():
                raise FabricError(
                    f"the file is padded, but not with zeros, in {axis} after {old} of {new}"
                )
            parts = np.moveaxis(parts[:old], 0, number + 1)
            array = parts.reshape(*shape[:number], groups * old, *shape[number + 1 :])
        return array

    def widen_matrix(self, path: str, matrix: TernaryMatrix) -> TernaryMatrix:
        """The codes of a linear, padded; its scale is as it was."""
        axes = LINEAR_AXES[path]
        codes = self.widen(unpack_codes(matrix.packed, matrix.k), axes)
        return replace(matrix, packed=pack_codes(codes), k=codes.shape[1])

    def narrow_matrix(self, path: str, matrix: TernaryMatrix) -> TernaryMatrix:
        """The inverse of :meth:`widen_matrix`."""
        axes = LINEAR_AXES[path]
        codes = self.narrow(unpack_codes(matrix.packed, matrix.k), axes)
        return replace(matrix, packed=pack_codes(codes), k=codes.shape[1])

    def fields(self) -> dict[str, int]:
        """What says in a file's metadata how wide the model was."""
        config = self.config
        return {
            f"{PREFIX}hidden_size": config.hidden_size,
            f"{PREFIX}ffn_size": config.ffn_size,
            f"{PREFIX}head_dim": config.head_dim,
        }


def plan_padding(config: ModelConfig, *, square: bool) -> Padding | None:
    """The least padding that makes all rows whole blocks; None where they are.

    Args:
        config: of a ternary model.
        square: H·hd must equal D, as arch ``bitnet`` has it.
    """
    ffn = -(-config.ffn_size // BLOCK) * BLOCK
    head_dim = config.head_dim
    while config.num_heads * head_dim % BLOCK:
        head_dim += 2
    hidden = -(-config.hidden_size // BLOCK) * BLOCK
    if square:
        # Whichever of the two needs more room decides.
        while config.num_heads * head_dim < hidden or config.num_heads * head_dim % BLOCK:
            head_dim += 2
        hidden = config.num_heads * head_dim
    padding = Padding(config=config, hidden_size=hidden, ffn_size=ffn, head_dim=head_dim)
    return None if padding.padded == config else padding


def read_padding(metadata: Mapping[str, Any], stored: ModelConfig) -> Padding | None:
    """The padding that a file's metadata tells of; None for none.

    Args:
        metadata: of the file.
        stored: the model with the widths that its tensors have.

    Raises:
        FabricError: the widths are none that padding can have led to.
    """
    names = ("hidden_size", "ffn_size", "head_dim")
    found = {name: metadata.get(PREFIX + name) for name in names}
    if all(value is None for value in found.values()):
        return None
    for name, value in found.items():
        if not isinstance(value, int) or not 0 < value <= getattr(stored, name):
            raise FabricError(
                f"{PREFIX}{name} is out of range",
                expected=f"a number up to {getattr(stored, name)}",
                found=str(value)[:40],
            )
    return Padding(
        config=replace(stored, **found),
        hidden_size=stored.hidden_size,
        ffn_size=stored.ffn_size,
        head_dim=stored.head_dim,
    )
