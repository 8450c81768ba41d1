"""How does a cell end?

For the tests of the runner; measures nothing and never imports jax.
"""

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fabric_jax.sweeps import Figure, NotOnThisPlatform, grid


@dataclass(frozen=True, kw_only=True)
class Config:
    how: str = "well"
    number: int = 1
    seconds: float = 0.0
    log: str = ""
    names: tuple[str, ...] = ("a", "b")
    maybe: int | None = None


FIGURE = Figure(x="number", y="value_seconds", series="how")
TIMEOUT_SECONDS = 30


def config() -> Config:
    return Config()


def cells(base: Config) -> list[Config]:
    hows = ("well", "signal", "raises", "device_memory", "host_memory", "never", "slow")
    hows += ("nothing", "leaves", "nan", "thread")
    return grid(base, how=hows, number=(1, 2))


def measure(cell: Config) -> dict[str, Any]:
    if cell.log:
        with Path(cell.log).open("a") as log:
            log.write(f"{cell.number if cell.maybe is None else cell.maybe}\n")
    time.sleep(cell.seconds)
    match cell.how:
        case "signal":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "raises":
            raise ValueError("a reason")
        case "device_memory":
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12 bytes.")
        case "host_memory":
            kept = [bytes([1]) * (32 << 20) for _ in range(24)]
            time.sleep(20)
            del kept
        case "never":
            raise NotOnThisPlatform("there is none")
        case "slow":
            time.sleep(20)
        case "nothing":
            return None  # pyright: ignore[reportReturnType]
        case "leaves":
            sys.exit(0)
        case "nan":
            return {"losses": [1.0, float("nan")]}
        case "thread":
            threading.Thread(target=time.sleep, args=(20,)).start()
        case _:
            pass
    return {"value_seconds": cell.number * 1.5, "kind": "run"}
