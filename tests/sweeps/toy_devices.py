"""Which device does a cell have, and when?

For the tests of the runner; never imports jax.
"""

import os
import time
from dataclasses import dataclass
from typing import Any

from fabric_jax.sweeps import grid
from fabric_jax.sweeps.experiment import runs_alone


@dataclass(frozen=True, kw_only=True)
class Config:
    number: int = 1


def config() -> Config:
    return Config()


def cells(base: Config) -> list[Config]:
    return grid(base, number=range(6))


def measure(cell: Config) -> dict[str, Any]:
    began = time.time()
    time.sleep(0.3)
    device = os.environ["CUDA_VISIBLE_DEVICES"]
    return {"device": device, "began": began, "ended": time.time(), "alone": runs_alone()}
