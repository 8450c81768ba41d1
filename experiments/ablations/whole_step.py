"""How much faster is a token when all layers are one launch?

Random weights, one row. Only CUDA GPUs have that kernel; without it a layer is five launches.

    fabric-jax sweep experiments.ablations.whole_step --platform cuda --out DIR

8 cells of half a minute.
"""

from dataclasses import dataclass, replace
from typing import Any

from experiments.decode_throughput import COLUMNS as COLUMNS
from experiments.decode_throughput import Settings, definition_of, measure_as, on_this_platform
from experiments.decode_throughput import environment as environment
from fabric_jax.models.decoder import define_decoder
from fabric_jax.sweeps import Figure, NotOnThisPlatform, current_platform, grid

FIGURE = Figure(x="model", y="decode_tokens_per_second", series="whole_step", kind="bar")


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """A cell of ``decode_throughput``, with or without the launch through all layers."""

    whole_step: bool = True


def config() -> Config:
    return Config(model="bitnet-1b")


def cells(base: Config) -> list[Config]:
    models = ("bitnet-125m", "bitnet-1b", "bitnet-2b-4t", "bitnet-13b")
    return grid(base, model=models, whole_step=(True, False))


def measure(cell: Config) -> dict[str, Any]:
    if current_platform() != "cuda":
        raise NotOnThisPlatform("one launch through all layers is for CUDA GPUs")
    plain = definition_of(on_this_platform(cell))
    options = replace(plain.options, whole_step=cell.whole_step)
    return measure_as(cell, define_decoder(plain.config, options))
