"""How steps of the peers are timed."""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any


def timed(step: Callable[[], Any], steps: int) -> list[float]:
    """Seconds of each step; a step's loss is read while the next one runs."""
    pending = step()
    ends: list[float] = []
    for _ in range(steps + 1):
        following = step()
        pending.item()
        ends.append(time.perf_counter())
        pending = following
    return [end - begin for begin, end in pairwise(ends)]
