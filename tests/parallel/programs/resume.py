"""Runs that stop after some steps, and go on on another mesh, or on one device.

Run as a process with an output folder, a model, rows, ``act_quant``, the steps of the whole run,
the step to stop after (0: none), and a mesh; the number of devices is fixed for a process. Prints
the loss of every step and the position in the data after it.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from fabric_jax.data.batch_stream import BatchStream
from fabric_jax.data.config import DataConfig
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.parallel.processes import DevicesConfig
from fabric_jax.training.config import FinetuneConfig, OptimizerConfig
from fabric_jax.training.loop import finetune


class Crash(Exception):
    """The process dies, as far as the run is concerned."""


def crash_after(steps: int) -> None:
    """The data source raises when it has given that many batches, by its own position."""
    take, given = BatchStream.__next__, 0

    def counted(self: BatchStream) -> Any:
        nonlocal given
        if given == steps:
            raise Crash
        given += 1
        return take(self)

    BatchStream.__next__ = counted


def main() -> None:
    output, model, rows, act_quant, steps, stop, mesh = sys.argv[1:]
    config = FinetuneConfig(
        output=output,
        model=model,
        dataset=DataConfig(data=rows, max_length=32, batch_size=4, packing=False),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        lora=LoraConfig(rank=4, dropout=0.1),
        act_quant=act_quant,  # pyright: ignore[reportArgumentType]
        save_every=3,
        max_steps=int(steps),
        epochs=int(steps),
        resume="auto",
        tensorboard=False,
        devices=DevicesConfig(mesh=mesh, spread_adapter="fsdp" in mesh),
    )
    if int(stop):
        crash_after(int(stop))
    with contextlib.suppress(Crash):
        finetune(config, console=Console(stderr=True))
    lines = (Path(output) / "metrics.jsonl").read_text().splitlines()
    print(
        json.dumps([[line["step"], line["epoch"], line["loss"]] for line in map(json.loads, lines)])
    )


if __name__ == "__main__":
    main()
