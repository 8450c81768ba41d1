"""``metrics.jsonl`` and TensorBoard events: one record a logged step."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fabric_jax.files import cannot_write, write_atomically
from fabric_jax.training.event_file import EventFile

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
"""Texts that a model wrote after evaluations, by step; only of runs that train all weights."""
TENSORBOARD = "tensorboard"

SCALARS = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "epoch": "train/epoch",
    "trainable_tokens_per_second": "speed/trainable_tokens_per_second",
    "real_tokens_per_second": "speed/real_tokens_per_second",
    "positions_per_second": "speed/positions_per_second",
    "peak_bytes": "memory/peak_bytes",
    "eval_loss": "eval/loss",
    "eval_perplexity": "eval/perplexity",
    "eval_bits_per_byte": "eval/bits_per_byte",
}
"""TensorBoard's names by field of ``StepRecord``."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """A line of metrics; means and rates are over the steps since the line before.

    Attributes:
        step: optimizer steps done.
        epoch: passes over the data done, with the fraction.
        loss: mean over the trainable tokens, nats.
        learning_rate: of this step.
        grad_norm: global norm of this step's gradient before clipping.
        trainable_tokens_per_second: targets with weight in the loss.
        real_tokens_per_second: positions that are not padding.
        positions_per_second: all positions.
        seconds: wall time of the run so far, loading and compilation left out.
        peak_bytes: the most memory in use so far.
        eval_loss: mean over the evaluation rows after this step, None where it wasn't measured.
        eval_bits_per_byte: of the evaluation text, which compares models of any vocabulary; None
            where its bytes aren't known.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    trainable_tokens_per_second: float
    real_tokens_per_second: float
    positions_per_second: float
    seconds: float
    peak_bytes: int
    eval_loss: float | None = None
    eval_bits_per_byte: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values; ``eval_loss`` and its perplexity only where measured."""
        values = asdict(self)
        if self.eval_bits_per_byte is None:
            del values["eval_bits_per_byte"]
        if self.eval_loss is None:
            del values["eval_loss"]
        else:
            values["eval_perplexity"] = perplexity(self.eval_loss)
        return values


class MetricsLog:
    """Appends records to the metrics of an output folder.

    Args:
        folder: the output folder.
        last_step: lines after this step, samples too, are removed first: a resumed run writes them
            again.
        tensorboard: whether to write events too.
    """

    def __init__(self, folder: Path, *, last_step: int, tensorboard: bool) -> None:
        """Cuts the file back and opens it.

        Raises:
            FabricError: it can't be written, or tensorboardX is asked for and not installed.
        """
        self._path = folder / METRICS
        for path in (self._path, folder / SAMPLES):
            cut_back(path, last_step)
        self._events = _open_events(folder / TENSORBOARD, last_step) if tensorboard else None
        try:
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def write(self, record: StepRecord) -> None:
        """Adds a record."""
        values = record.to_json()
        line = json.dumps(values) + "\n"
        self._guarded(lambda: (self._file.write(line), self._file.flush()))
        for name, scalar in SCALARS.items():
            if name in values:
                self._add_scalar(scalar, values[name], record.step)

    def write_first_evaluation(self, loss: float) -> None:
        """Adds the evaluation before the first step, which has no line, to the events."""
        self._add_scalar(SCALARS["eval_loss"], loss, 0)
        self._add_scalar(SCALARS["eval_perplexity"], perplexity(loss), 0)

    def sync(self) -> None:
        """Returns when the file is on disk: a checkpoint must not be newer than its metrics."""
        self._guarded(lambda: os.fsync(self._file.fileno()))
        if self._events is not None:
            self._guarded(self._events.flush)

    def close(self) -> None:
        """Closes file and events."""
        self._guarded(self._file.close)
        if self._events is not None:
            self._guarded(self._events.close)

    def _add_scalar(self, name: str, value: float, step: int) -> None:
        events = self._events
        if events is not None:
            self._guarded(lambda: events.add_scalar(name, value, step))

    def _guarded(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            raise cannot_write(self._path, error) from error


def cut_back(path: Path, last_step: int) -> None:
    """Removes the lines after ``last_step``, and a line that a killed process left unfinished."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise cannot_write(path, error) from error
    kept: list[bytes] = []
    for line in text.splitlines(keepends=True):
        if not line.endswith(b"\n") or _step_of(line) > last_step:
            break
        kept.append(line)
    write_atomically(path, b"".join(kept))


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _step_of(line: bytes) -> float:
    """The step of a line; infinite where it can't be read, so that it is removed."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _open_events(folder: Path, last_step: int) -> EventFile:
    # Tells TensorBoard to forget what an interrupted session wrote after the checkpoint.
    purge = last_step + 1 if last_step else 0
    try:
        return EventFile(folder, purge)
    except OSError as error:
        raise cannot_write(folder, error) from error
