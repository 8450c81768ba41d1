"""A packed ternary matrix, alone or as one layer of a stack."""

from dataclasses import dataclass, field
from functools import partial

import jax
import numpy as np
from jax import lax

from fabric_kernels.packing import Packing, packed_width


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["packed", "scale", "layer"],
    meta_fields=["k", "packing"],
)
@dataclass(frozen=True)
class TernaryWeight:
    """What stands for a frozen [N, K] weight.

    A layer of a stack is named by index and read where it lies: a slice, as ``lax.scan`` makes of
    what it iterates over, would be copied in front of every call of a kernel.

    Attributes:
        packed: uint8 [N, W], or [L, N, W] for a stack of layers.
        scale: float32, multiplies the codes; [] or [L].
        layer: int32 [], which layer of the stack; None where there is no stack.
        k: K.
        packing: layout of the bytes (``fabric_kernels.packing``).
    """

    packed: jax.Array
    scale: jax.Array
    layer: jax.Array | None
    k: int = field(metadata={"static": True})
    packing: Packing = field(default="ternary2", metadata={"static": True})

    @property
    def n(self) -> int:
        """Outputs."""
        return self.packed.shape[-2]

    def check(self) -> None:
        """Raises TypeError or ValueError where dtype or shape don't fit."""
        if self.packed.dtype != np.uint8:
            raise TypeError(f"packed ternary weights are uint8, found {self.packed.dtype}")
        width = packed_width(self.k, self.packing)
        dims = 2 if self.layer is None else 3
        if self.packed.ndim != dims or self.packed.shape[-1] != width:
            stack = "" if self.layer is None else "L, "
            raise ValueError(
                f"packed ternary weights for {self.k} inputs have shape [{stack}N, {width}], "
                f"found {list(self.packed.shape)}"
            )
        if self.scale.dtype != np.float32:
            raise TypeError(f"scales of ternary weights are float32, found {self.scale.dtype}")
        one_each = () if self.layer is None else (self.packed.shape[0],)
        if self.scale.shape not in ((), one_each):
            stacked = "" if self.layer is None else f" or {list(one_each)}"
            raise ValueError(
                f"there is one scale for each matrix, shape []{stacked}, "
                f"found {list(self.scale.shape)}"
            )

    def single(self) -> "TernaryWeight":
        """The layer alone; a copy unless the compiler fuses it."""
        if self.layer is None:
            return self
        packed = lax.dynamic_index_in_dim(self.packed, self.layer, keepdims=False)
        scale = self.scale
        if scale.ndim:
            scale = lax.dynamic_index_in_dim(scale, self.layer, keepdims=False)
        return TernaryWeight(packed, scale, None, self.k, self.packing)


def no_gradient(weight: TernaryWeight) -> TernaryWeight:
    """The cotangent of a frozen weight."""
    layer = None if weight.layer is None else np.zeros((), jax.dtypes.float0)
    return TernaryWeight(
        np.zeros(weight.packed.shape, jax.dtypes.float0),  # pyright: ignore[reportArgumentType]
        jax.numpy.zeros_like(weight.scale),
        layer,  # pyright: ignore[reportArgumentType]
        weight.k,
        weight.packing,
    )
