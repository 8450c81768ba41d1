"""How fast does the processor beside a GPU generate, if a GPU is held against its own host?

    fabric-jax sweep experiments.host_decode --platform cpu --out DIR

On the machine of the GPU: the report puts these cells beside those of ``decode_throughput`` on
CUDA whose host has the same processor. 4 cells of half a minute on 16 cores.
"""

from typing import Any

from experiments import decode_throughput
from experiments.decode_throughput import COLUMNS as COLUMNS
from experiments.decode_throughput import FIGURE as FIGURE
from experiments.decode_throughput import TIMEOUT_SECONDS as TIMEOUT_SECONDS
from experiments.decode_throughput import Settings
from fabric_jax.sweeps import NotOnThisPlatform, current_platform, grid


def config() -> Settings:
    return Settings(model="bitnet-1b")


def cells(base: Settings) -> list[Settings]:
    return grid(base, model=("bitnet-125m", "bitnet-350m", "bitnet-1b", "bitnet-2b-4t"))


def measure(cell: Settings) -> dict[str, Any]:
    if current_platform() != "cpu":
        raise NotOnThisPlatform("decode_throughput measures the device; this is for its host")
    return decode_throughput.measure(cell)
