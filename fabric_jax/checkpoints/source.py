"""What every reader of a model gives and every writer takes: its tensors, one at a time.

Whatever a format does to them (the order of rows, packing, reciprocal scales, names) is undone by
its reader and redone by its writer: a source is always in the convention of fabric_jax. Names are
those of the base tree (``native.base_layouts``).
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import UInt8

from fabric_jax.checkpoints.arrays import HostArray
from fabric_jax.layers.bit_linear import BaseMode
from fabric_jax.models.config import ModelConfig
from fabric_jax.quantization.absmax import ActQuant

ALL_ROWS = slice(None)


@dataclass(frozen=True, kw_only=True)
class TernaryMatrix:
    """One packed matrix.

    Attributes:
        packed: codes in the layout ``ternary2`` of ``fabric_kernels.packing``, uint8
            [N, ceil(K / 4)]; no field is 3 and those after the last code hold 1 (code 0).
        scale: the float32 number that multiplies the codes; finite and positive.
        k: K, codes in a row.
    """

    packed: UInt8[np.ndarray, "n k/4"]
    scale: float
    k: int


class ModelSource(Protocol):
    """A model that can be read tensor by tensor, in any order and more than once.

    Opening one reads metadata only, and checks that all tensors are there in the right shapes.
    Values are checked when they are read: both methods raise ``FabricError`` for values that are
    not finite and for bytes that are no codes. Arrays may be read-only and may be views of a
    mapped file: whoever keeps one copies it.
    """

    @property
    def config(self) -> ModelConfig:
        """What the model is."""
        ...

    @property
    def form(self) -> BaseMode:
        """What :meth:`linear` gives: packed matrices, or floats that are masters or plain."""
        ...

    @property
    def act_quant(self) -> ActQuant:
        """The quantiser of the inputs of ternary linears that the model was made for."""
        ...

    @property
    def tokenizer_source(self) -> str:
        """The model's tokenizer as ``data.load_tokenizer`` takes it; "" for one that has none."""
        ...

    @property
    def origin(self) -> str:
        """The path or hub id, for messages."""
        ...

    def linear(self, path: str, layer: int) -> TernaryMatrix | HostArray:
        """The matrix [N, K] of a linear.

        Args:
            path: as in ``ModelConfig.linear_shapes``, say ``"attention.q"``.
            layer: from 0.

        Returns:
            A ``TernaryMatrix`` where ``form`` is ``packed``; otherwise floats in the precision they
            are stored in (float32, float16, bfloat16), or float32 where they had to be computed.
        """
        ...

    def tensor(self, name: str, layer: int | None = None, *, rows: slice = ALL_ROWS) -> HostArray:
        """Any other tensor, in the precision it is stored in, or float32 if it was computed.

        Args:
            name: in the base tree: ``"embedding"`` [V, D], ``"head"`` [V, D] (of models with a head
                of their own), ``"final_norm.gain"``, ``"layers.attention_norm.gain"``, ….
            layer: of names that start with ``layers.``.
            rows: a part of the first axis, so that large tables can be read piece by piece.
        """
        ...
