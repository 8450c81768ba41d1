"""Sources made of other sources: with another tokenizer, watched, with an adapter merged in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from fabric_jax.checkpoints.arrays import HostArray
from fabric_jax.checkpoints.assemble import quantize_matrix
from fabric_jax.checkpoints.source import ALL_ROWS, ModelSource, TernaryMatrix
from fabric_jax.checkpoints.ternary import dequantize, pack_codes
from fabric_jax.errors import FabricError
from fabric_jax.layers.bit_linear import BaseMode
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.initialize import Tree
from fabric_jax.quantization.absmax import ActQuant

CODE_BLOCK_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Derived:
    """Another source's tensors; what differs is in the subclasses.

    Attributes:
        source: the other one.
        tokenizer: in place of its own; None to keep that.
    """

    source: ModelSource
    tokenizer: str | None = None

    @property
    def config(self) -> ModelConfig:
        """See ``ModelSource``."""
        return self.source.config

    @property
    def form(self) -> BaseMode:
        """See ``ModelSource``."""
        return self.source.form

    @property
    def act_quant(self) -> ActQuant:
        """See ``ModelSource``."""
        return self.source.act_quant

    @property
    def tokenizer_source(self) -> str:
        """See ``ModelSource``."""
        return self.source.tokenizer_source if self.tokenizer is None else self.tokenizer

    @property
    def origin(self) -> str:
        """See ``ModelSource``."""
        return self.source.origin

    def linear(self, path: str, layer: int) -> TernaryMatrix | HostArray:
        """See ``ModelSource``."""
        return self.source.linear(path, layer)

    def tensor(self, name: str, layer: int | None = None, *, rows: slice = ALL_ROWS) -> HostArray:
        """See ``ModelSource``."""
        return self.source.tensor(name, layer, rows=rows)


@dataclass(frozen=True, kw_only=True)
class Watched(Derived):
    """Tells what is being read.

    Attributes:
        report: called with a line before each read.
    """

    report: Callable[[str], None]

    def linear(self, path: str, layer: int) -> TernaryMatrix | HostArray:
        """See ``ModelSource``."""
        self.report(f"layer {layer + 1} of {self.config.num_layers}: {path}")
        return self.source.linear(path, layer)

    def tensor(self, name: str, layer: int | None = None, *, rows: slice = ALL_ROWS) -> HostArray:
        """See ``ModelSource``."""
        if layer is None:
            self.report(name)
        return self.source.tensor(name, layer, rows=rows)


@dataclass(frozen=True, kw_only=True)
class Merged(Derived):
    """The base as it computes and the adapter, summed in float32: a dense model.

    A ternary base loses its quantisers: neither weights nor activations are quantised any more, so
    the outputs are those of ``act_quant`` ``none``.

    Attributes:
        lora: settings of the adapter.
        adapter: its tree.
    """

    lora: LoraConfig
    adapter: Tree

    @property
    def config(self) -> ModelConfig:
        """See ``ModelSource``."""
        return replace(self.source.config, ternary=False)

    @property
    def form(self) -> BaseMode:
        """See ``ModelSource``."""
        return "float"

    @property
    def act_quant(self) -> ActQuant:
        """See ``ModelSource``."""
        return "none"

    def linear(self, path: str, layer: int) -> HostArray:
        """``W + scale · (A^T B)^T``, float32 [N, K]."""
        matrix = self.source.linear(path, layer)
        if self.source.form == "master":
            assert not isinstance(matrix, TernaryMatrix)
            matrix = quantize_matrix(matrix)
        if isinstance(matrix, TernaryMatrix):
            dense = dequantize(matrix.packed, matrix.scale, matrix.k)
        else:
            dense = matrix.astype(np.float32)
        change = lora_change(self.lora, self.adapter, path, layer)
        return dense if change is None else dense + change


@dataclass(frozen=True, kw_only=True)
class Reternarised(Derived):
    """A merged model whose linears are made ternary again, at the scales that the base had.

    ``codes = clip(rint((scale · codes + D) / scale), -1, 1)``. Of the ways to do it this leaves the
    smallest error: the absmean of already ternary weights is the share of non-zeros too small, and
    spoils the base too. A code changes only where ``|D|`` exceeds half the scale.

    Attributes:
        lora: settings of the adapter.
        adapter: its tree.
    """

    lora: LoraConfig
    adapter: Tree

    def __post_init__(self) -> None:
        """Refuses a base that is not packed."""
        if self.source.form != "packed":
            raise FabricError(
                f"{self.origin} holds {self.source.form} weights", expected="packed ones"
            )

    def linear(self, path: str, layer: int) -> TernaryMatrix:
        """See ``ModelSource``."""
        matrix = self.source.linear(path, layer)
        assert isinstance(matrix, TernaryMatrix)
        change = lora_change(self.lora, self.adapter, path, layer)
        if change is None:
            return matrix
        merged = dequantize(matrix.packed, matrix.scale, matrix.k) + change
        codes = np.clip(np.rint(merged / np.float32(matrix.scale)), -1, 1)
        return replace(matrix, packed=pack_codes(codes))


def lora_change(lora: LoraConfig, adapter: Tree, path: str, layer: int) -> HostArray | None:
    """What an adapter adds to a weight, ``scale · (A^T B)^T`` in float32 [N, K]; None for nothing.

    Args:
        lora: settings of the adapter.
        adapter: its tree, A [L, R, K] and B [L, R, N].
        path: as in ``ModelConfig.linear_shapes``.
        layer: from 0.
    """
    group, _, name = path.partition(".")
    if not lora.covers(name):
        return None
    pair: Mapping[str, HostArray] = adapter["layers"][group][name]["lora"]
    a, b = (np.asarray(pair[matrix][layer], np.float32) for matrix in "ab")
    return np.float32(lora.of(name).scale) * (b.T @ a)
