"""One session of a run: from its start or a checkpoint to its end, a signal or an error."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fabric_jax.checkpoints.train_state import TrainCheckpoints
from fabric_jax.data.batch import Batch
from fabric_jax.data.load import Data
from fabric_jax.errors import FabricError
from fabric_jax.evaluation.perplexity import Perplexity, evaluate_perplexity, make_eval_step
from fabric_jax.measurement.categories import CompiledMemory, compiled_memory
from fabric_jax.measurement.memory import peak_memory_bytes, release_free_memory
from fabric_jax.models.decoder import DecoderDefinition
from fabric_jax.models.initialize import Tree
from fabric_jax.training.config import RunConfig
from fabric_jax.training.interrupt import Interrupted, Interrupts
from fabric_jax.training.metrics import MetricsLog, StepRecord
from fabric_jax.training.optimizer import learning_rate_schedule, make_optimizer
from fabric_jax.training.partition import freezes_a
from fabric_jax.training.progress import RunProgress
from fabric_jax.training.step import (
    StepMetrics,
    StepOptions,
    Trains,
    TrainState,
    init_state,
    make_train_step,
)
from fabric_jax.training.totals import Totals

DROPOUT_STREAM = 2
"""Folded into the key of the seed; base weights and adapter use other numbers."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, on what, and where it goes.

    Attributes:
        definition: of the decoder.
        trains: which of its two trees.
        frozen: the other one.
        fresh: makes the trained tree as it is before the first step; what it returns is consumed.
        data: what to train and evaluate on.
        weights: names the frozen weights or the origin of random ones, for resuming.
        kind: what is trained, also the name of its folder in the output.
        export: writes the trained tree into a folder.
        keep_best: whether to export the best state too, beside the last.
        resume_with: what the user is told to run after an interrupt.
        notes: what else is said before the first step.
        fused: whether each layer is updated within the backward pass.
        step: how the loss of a step is computed.
        settings: what a step depends on that is in no other attribute; for resuming.
        sample: texts that the model writes, given the step and the trained tree; called after
            evaluations. None for none.
    """

    definition: DecoderDefinition
    trains: Trains
    frozen: Tree
    fresh: Callable[[], Tree]
    data: Data
    weights: str
    kind: str
    export: Callable[[Path, Tree], None]
    keep_best: bool
    resume_with: str
    notes: tuple[str, ...] = ()
    fused: bool = False
    step: StepOptions = field(default_factory=StepOptions)
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    sample: Callable[[int, Tree], list[str]] | None = None


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """A step whose results have not been read.

    Attributes:
        step: its number, from 1.
        epoch: passes over the data done after it.
        evaluated: whether an evaluation follows, whose result belongs in the step's record.
        metrics: its results, on the device.
    """

    step: int
    epoch: float
    evaluated: bool
    metrics: StepMetrics


class _Stopped(Exception):
    """An evaluation was left because of a signal."""


class Session:
    """Trains until the last step.

    Results of a step are read while the next one runs, so an accelerator never waits for the host
    except around evaluations and checkpoints. Those see a state whose loss and gradient were read
    and are finite.

    Args:
        config: of the run.
        job: what to train.
        total_steps: optimizer steps of the whole run.
        checkpoints: of the output folder.
    """

    def __init__(
        self, config: RunConfig, job: Job, total_steps: int, checkpoints: TrainCheckpoints
    ) -> None:
        """Takes up the newest checkpoint, or starts anew."""
        self.config = config
        self.job = job
        self.total_steps = total_steps
        self.checkpoints = checkpoints
        self.output = Path(config.output)
        freeze_a = freezes_a(job.definition, job.trains)
        self.optimizer = make_optimizer(config.optimizer, total_steps, freeze_a=freeze_a)
        self.compile_seconds = 0.0
        self.compiled: CompiledMemory | None = None
        schedule = learning_rate_schedule(config.optimizer, total_steps)
        self._rates = np.asarray(schedule(jnp.arange(total_steps)), np.float64)
        self._rates = np.broadcast_to(self._rates, total_steps)
        self._eval_step = make_eval_step(job.definition)
        self._durations: list[float] = []
        self.state, self.totals = self._start()
        self.step = self._saved_step = int(self.state.step)
        # On CPU the scratch of a waiting step is allocated at once: two steps would hold it twice.
        self._dispatches_ahead = jax.default_backend() != "cpu"

    def run(self, log: MetricsLog, progress: RunProgress) -> None:
        """Runs the remaining steps, with their evaluations and checkpoints.

        Raises:
            Interrupted: a signal came; the state was saved.
            FabricError: a loss or gradient is not finite, or the output can't be written.
        """
        self._log, self._progress = log, progress
        compiled = self._compile() if self.step < self.total_steps else None
        with Interrupts(self._notify) as self._interrupts:
            self._first_step = self.step + 1
            self._zero = time.perf_counter() - self.totals.elapsed
            self._milestone()
            if compiled is not None:
                self._steps(compiled)
        self.totals.elapsed = self._elapsed()

    @property
    def epoch(self) -> float:
        """Passes over the data done, with the fraction."""
        stream = self.job.data.train
        position = stream.get_state()
        return position["epoch"] + position["batch"] / stream.batches_in_epoch(position["epoch"])

    def _start(self) -> tuple[TrainState, Totals]:
        """The state to go on from; the data is moved to its position."""
        definition = self.job.definition
        declared = definition.adapter if self.job.trains == "adapter" else definition.base
        like: Tree = nnx.to_pure_dict(declared)
        restored = self.checkpoints.restore(like, jax.eval_shape(self.optimizer.init, like))
        if restored is None:
            return init_state(self.job.fresh(), self.optimizer), Totals()
        self.job.data.train.set_state(restored.data_state)
        state = TrainState(
            params=restored.params, moments=restored.moments, step=jnp.int32(restored.step)
        )
        return state, Totals.from_json(restored.meta["totals"])

    def _compile(self) -> jax.stages.Compiled:
        """The step's program, made before the clock starts."""
        start = time.perf_counter()
        # The programs that made or loaded the weights are not needed again and hold tens of MiB.
        jax.clear_caches()
        dataset = self.config.dataset
        shape = (self.config.accumulation, dataset.batch_size, dataset.max_length)
        self._root = jax.random.fold_in(jax.random.key(self.config.seed), DROPOUT_STREAM)
        step = make_train_step(
            self.job.definition,
            self.optimizer,
            trains=self.job.trains,
            fused=self.job.fused,
            options=self.job.step,
        )
        compiled = step.lower(
            self.state, self.job.frozen, _abstract_batch(shape), self._root
        ).compile()
        self.compile_seconds = time.perf_counter() - start
        self.compiled = compiled_memory(compiled)
        release_free_memory()
        return compiled

    def _steps(self, compiled: jax.stages.Compiled) -> None:
        pending: _Pending | None = None
        while self.step < self.total_steps:
            batch = next(self.job.data.train)
            if pending is not None and not self._dispatches_ahead:
                self._settle(pending)
                pending = None
            self.state, metrics = compiled(self.state, self.job.frozen, batch, self._root)
            if pending is not None:
                self._settle(pending)
            self.step += 1
            evaluated = self._evaluation_due()
            pending = _Pending(
                step=self.step, epoch=self.epoch, evaluated=evaluated, metrics=metrics
            )
            if evaluated or self._save_due() or self._interrupts.received:
                self._settle(pending)
                pending = None
                self._milestone()

    def _settle(self, pending: _Pending) -> None:
        """Reads a step's results and counts them; this waits for the step."""
        metrics = jax.device_get(pending.metrics)
        now = time.perf_counter()
        seconds, self._ready = now - self._ready, now
        loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise FabricError(
                f"training diverged in step {pending.step}: loss {loss}, gradient norm {grad_norm}",
                fix="Lower the learning rate or lengthen the warm-up; the state was not saved, "
                "earlier checkpoints are intact",
            )
        if pending.step > self._first_step:
            self._durations.append(seconds)
        dataset = self.config.dataset
        self.totals.add_step(
            loss=loss,
            grad_norm=grad_norm,
            trainable_tokens=round(float(metrics.trainable_tokens)),
            real_tokens=int(metrics.real_tokens),
            positions=self.config.accumulation * dataset.batch_size * dataset.max_length,
            seconds=seconds,
        )
        self._progress.advance(pending.step)
        if self._log_due(pending.step) and not pending.evaluated:
            self._record(pending.step, pending.epoch, None)

    def _milestone(self) -> None:
        """Evaluates, records and saves where that is due after the present step.

        A session that begins here does what an interrupt kept the last one from doing.
        """
        if self._evaluation_due() and self.totals.evaluated_step < self.step:
            self._evaluate()
        if self._interrupts.received or self._save_due():
            self._save()
        if self._interrupts.received:
            self._leave(self._interrupts.received)
        self._ready = time.perf_counter()

    def _evaluate(self) -> None:
        """Measures the evaluation loss, records it, exports a best state; nothing if stopped."""
        stream = self.job.data.evaluation
        if stream is None:
            return
        params, frozen = self.state.params, self.job.frozen
        base, adapter = (frozen, params) if self.job.trains == "adapter" else (params, frozen)
        try:
            measured = evaluate_perplexity(
                self._eval_step, base, adapter, self._until_stopped(stream.epoch(0))
            )
        except _Stopped:
            return
        loss = measured.loss
        if not math.isfinite(loss):
            raise FabricError(
                f"the evaluation after step {self.step} gives a loss of {loss}",
                fix="Lower the learning rate; earlier checkpoints are intact",
            )
        improved = self.totals.add_evaluation(self.step, loss)
        self.totals.eval_bits_per_byte_last = bits = self._bits_per_byte(measured)
        if self.step == 0:
            self._log.write_first_evaluation(loss)
            self._progress.note(f"before training: eval loss {loss:.4f}")
        elif self.totals.logged_step < self.step:
            self._record(self.step, self.epoch, loss, bits)
        if self.job.sample is not None and self.step:
            for text in self.job.sample(self.step, params):
                self._progress.note(f"sample: {text}")
        if improved and self.job.keep_best:
            self.job.export(self.output / f"{self.job.kind}_best", params)
        self._saved_step = -1

    def _bits_per_byte(self, measured: Perplexity) -> float | None:
        """Bits that a byte of the evaluation text takes; None where its bytes aren't known."""
        size = self.job.data.evaluation_bytes
        return None if not size else measured.loss * measured.tokens / math.log(2) / size

    def _record(
        self, step: int, epoch: float, eval_loss: float | None, bits: float | None = None
    ) -> None:
        """Writes a line of metrics over the steps since the last one."""
        window = self.totals.window
        record = StepRecord(
            step=step,
            epoch=epoch,
            loss=window.mean_loss,
            learning_rate=float(self._rates[step - 1]),
            grad_norm=self.totals.grad_norm_last or 0.0,
            trainable_tokens_per_second=window.rate(window.trainable_tokens),
            real_tokens_per_second=window.rate(window.real_tokens),
            positions_per_second=window.rate(window.positions),
            seconds=self._elapsed(),
            peak_bytes=peak_memory_bytes(),
            eval_loss=eval_loss,
            eval_bits_per_byte=bits,
        )
        self._log.write(record)
        self._progress.show(record, window.seconds / max(window.steps, 1))
        self.totals.close_window(step)

    def _save(self) -> None:
        """Saves the present state in the background, unless it is what was saved last."""
        if self.step == self._saved_step or self.step == 0:
            return
        if self._durations:
            self.totals.seconds_per_step = statistics.median(self._durations)
        self.totals.elapsed = self._elapsed()
        self._log.sync()
        evaluated = self.totals.evaluated_step == self.step
        self.checkpoints.save(
            self.step,
            self.state.params,
            self.state.moments,
            data_state=self.job.data.train.get_state(),
            meta={"totals": self.totals.to_json()},
            metric=self.totals.eval_loss_last if evaluated else None,
        )
        self._saved_step = self.step

    def _leave(self, number: int) -> None:
        self.checkpoints.wait()
        saved = "before the first step, nothing to save" if self.step == 0 else "saved"
        raise Interrupted(
            f"stopped after step {self.step} of {self.total_steps}, {saved}. "
            f"To resume:\n  {self.job.resume_with}",
            number,
        )

    def _notify(self, number: int) -> None:
        self._progress.note("finishing the step and saving; once more to stop at once")

    def _until_stopped(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if self._interrupts.received:
                raise _Stopped
            yield batch

    def _evaluation_due(self) -> bool:
        if self.job.data.evaluation is None:
            return False
        if self.step in (0, self.total_steps):
            return True
        if self.config.eval_every:
            return self.step % self.config.eval_every == 0
        return self.job.data.train.get_state()["batch"] == 0

    def _save_due(self) -> bool:
        if self.step == self.total_steps or self.totals.best_step == self.step:
            return True
        return self.config.save_every > 0 and self.step % self.config.save_every == 0

    def _log_due(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step == self.total_steps

    def _elapsed(self) -> float:
        return time.perf_counter() - self._zero


def _abstract_batch(shape: tuple[int, int, int]) -> Batch:
    """A batch without contents, for compiling."""
    # Tracing takes a description in place of an array; the annotation of the fields is jax's.
    ints = cast(jax.Array, jax.ShapeDtypeStruct(shape, jnp.int32))
    floats = cast(jax.Array, jax.ShapeDtypeStruct(shape, jnp.float32))
    return Batch(tokens=ints, targets=ints, loss_mask=floats, segment_ids=ints, positions=ints)
