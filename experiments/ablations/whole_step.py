"""How much faster is a token when all layers are one launch?

Random weights, one row: layer by layer (five launches each), Triton's launch for any CUDA GPU, and
Mosaic's for Hopper.

    fabric-jax sweep experiments.ablations.whole_step --platform cuda --out DIR

12 cells of half a minute.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from experiments.decode_throughput import COLUMNS as COLUMNS
from experiments.decode_throughput import Settings, definition_of, measure_as, on_this_platform
from experiments.decode_throughput import environment as environment
from fabric_jax.models.decoder import define_decoder
from fabric_jax.sweeps import Figure, NotOnThisPlatform, current_platform, grid

FIGURE = Figure(x="model", y="decode_tokens_per_second", series="decode", kind="bar")


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """A cell of ``decode_throughput``: layer by layer, or what runs all of them at once."""

    decode: Literal["layers", "triton", "mosaic_gpu"] = "mosaic_gpu"


def config() -> Config:
    return Config(model="bitnet-1b")


def cells(base: Config) -> list[Config]:
    models = ("bitnet-125m", "bitnet-1b", "bitnet-2b-4t", "bitnet-13b")
    return grid(base, model=models, decode=("layers", "triton", "mosaic_gpu"))


def measure(cell: Config) -> dict[str, Any]:
    if current_platform() != "cuda":
        raise NotOnThisPlatform("one launch through all layers is for CUDA GPUs")
    # The products' implementation names what takes them all; layer by layer each has its own.
    named = "" if cell.decode == "layers" else cell.decode
    plain = definition_of(on_this_platform(replace(cell, implementation=named)))
    options = replace(plain.options, whole_step=cell.decode != "layers")
    return measure_as(cell, define_decoder(plain.config, options))
