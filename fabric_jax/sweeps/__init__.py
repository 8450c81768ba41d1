"""Sweeps: an experiment's cells, each in a process of its own, each with a record."""

from fabric_jax.sweeps.cells import grid
from fabric_jax.sweeps.experiment import (
    Figure,
    NotOnThisPlatform,
    current_platform,
    own_turn,
    runs_alone,
)

__all__ = [
    "Figure",
    "NotOnThisPlatform",
    "current_platform",
    "grid",
    "own_turn",
    "runs_alone",
]
