"""Repeated timings as a median with its spread."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one repeated thing.

    Attributes:
        median: of all repetitions.
        low: first quartile.
        high: third quartile.
        fastest: the smallest.
        count: repetitions.
    """

    median: float
    low: float
    high: float
    fastest: float
    count: int

    @property
    def spread(self) -> float:
        """Interquartile range as a share of the median; 0 where the median is 0."""
        return (self.high - self.low) / self.median if self.median else 0.0


def summarize(seconds: Sequence[float]) -> Timing:
    """Median and quartiles (linear between neighbours) of one or more durations."""
    if not seconds:
        raise ValueError("a timing needs at least one repetition")
    if len(seconds) == 1:
        low = high = seconds[0]
    else:
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(
        median=statistics.median(seconds),
        low=low,
        high=high,
        fastest=min(seconds),
        count=len(seconds),
    )


def time_repeated(call: Callable[[], Any], *, repeats: int = 10, warmup: int = 2) -> Timing:
    """Times ``call`` until its arrays are ready, after ``warmup`` calls that don't count."""
    for _ in range(warmup):
        jax.block_until_ready(call())
    seconds: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return summarize(seconds)
