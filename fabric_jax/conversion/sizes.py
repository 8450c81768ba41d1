"""How large a written model is, counted in its files."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fabric_jax.checkpoints.gguf.names import linear_name
from fabric_jax.checkpoints.huggingface.names import LINEARS
from fabric_jax.checkpoints.tensor_file import open_tensors
from fabric_jax.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of a model.

    Attributes:
        total: of all files.
        linears: of the weights and scales of the linears of all layers.
        bits_per_weight: that makes for each weight of a linear, padding counted as cost.
    """

    total: int
    linears: int
    bits_per_weight: float


def measure_sizes(output: Path, config: ModelConfig) -> Sizes:
    """The sizes of what was written to ``output``, a folder or a ``.gguf`` file."""
    if output.is_dir():
        total = sum(path.stat().st_size for path in output.iterdir() if path.is_file())
        linears = sum(_linear_bytes(path) for path in output.glob("*.safetensors"))
    else:
        from fabric_jax.gguf_container import read_gguf

        total = output.stat().st_size
        tensors = read_gguf(output).tensors
        paths, layers = config.linear_shapes, range(config.num_layers)
        linears = sum(tensors[linear_name(path, i)].nbytes for path in paths for i in layers)
    bits = 8 * linears / config.linear_parameters
    return Sizes(total=total, linears=linears, bits_per_weight=bits)


def _linear_bytes(path: Path) -> int:
    """Those of one safetensors file, under our names or those of transformers."""
    ours = tuple(f"layers.{path}." for path in LINEARS)
    theirs = tuple(f".{module}." for module in LINEARS.values())
    return sum(
        math.prod(layout.shape) * np.dtype(layout.dtype).itemsize
        for name, layout in open_tensors(path).layouts.items()
        if name.startswith(ours) or any(module in name for module in theirs)
    )
