"""Master weights for a packed model that is to be trained on."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from fabric_jax.checkpoints.arrays import HostArray
from fabric_jax.checkpoints.source import ALL_ROWS, ModelSource, TernaryMatrix
from fabric_jax.checkpoints.ternary import dequantize
from fabric_jax.layers.bit_linear import BaseMode
from fabric_jax.models.config import ModelConfig
from fabric_jax.quantization.absmax import ActQuant


@dataclass(frozen=True, kw_only=True)
class MastersOf:
    """A packed source as masters under which the model computes what it did.

    The absmean of ``s · T`` is ``p · s``, p the share of non-zero codes: masters of ``s / p · T``
    have the absmean s, and quantise to T. Scales differ by a rounding of float32; a matrix of zeros
    stays one.

    Attributes:
        source: of packed matrices.
    """

    source: ModelSource

    @property
    def config(self) -> ModelConfig:
        """See ``ModelSource``."""
        return self.source.config

    @property
    def form(self) -> BaseMode:
        """See ``ModelSource``."""
        return "master"

    @property
    def act_quant(self) -> ActQuant:
        """See ``ModelSource``."""
        return self.source.act_quant

    @property
    def tokenizer_source(self) -> str:
        """See ``ModelSource``."""
        return self.source.tokenizer_source

    @property
    def origin(self) -> str:
        """See ``ModelSource``."""
        return self.source.origin

    def linear(self, path: str, layer: int) -> HostArray:
        """See ``ModelSource``."""
        matrix = self.source.linear(path, layer)
        assert isinstance(matrix, TernaryMatrix)
        return masters_of(matrix)

    def tensor(self, name: str, layer: int | None = None, *, rows: slice = ALL_ROWS) -> HostArray:
        """See ``ModelSource``."""
        return self.source.tensor(name, layer, rows=rows)


def masters_of(matrix: TernaryMatrix) -> Float32[np.ndarray, "n k"]:
    """``s / p · T``, float32."""
    codes = dequantize(matrix.packed, 1.0, matrix.k)
    share = np.count_nonzero(codes) / codes.size
    return codes * np.float32(matrix.scale / share if share else 0.0)
