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
from jax.sharding import Mesh

from fabric_jax.checkpoints.train_state import Restored, TrainCheckpoints
from fabric_jax.data.batch import Batch
from fabric_jax.data.load import Data
from fabric_jax.errors import FabricError
from fabric_jax.evaluation.perplexity import Perplexity, evaluate_perplexity, make_eval_step
from fabric_jax.measurement.categories import CompiledMemory, compiled_memory
from fabric_jax.measurement.memory import peak_memory_bytes, release_free_memory
from fabric_jax.models.decoder import DecoderDefinition
from fabric_jax.models.initialize import Tree
from fabric_jax.parallel.placement import place_rows
from fabric_jax.parallel.processes import from_first, is_first, json_from_first, largest, on_host
from fabric_jax.training.config import RunConfig
from fabric_jax.training.interrupt import Interrupted, Interrupts
from fabric_jax.training.metrics import MetricsLog, StepRecord
from fabric_jax.training.on_mesh import abstract_rows, place_state
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

MOST_SKIPPED = 10
"""Steps in a row whose update was left out that end a run."""
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
        mesh: the devices, along which the base is cut; None for one device.
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
    mesh: Mesh | None = None
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
        checkpoints: of the output folder; None in a process that doesn't write.
    """

    def __init__(
        self,
        config: RunConfig,
        job: Job,
        total_steps: int,
        checkpoints: TrainCheckpoints | None,
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
        self._eval_step = make_eval_step(job.definition, job.mesh)
        self._durations: list[float] = []
        self._stop: int | None = None
        self._skipped = 0
        self.state, self.totals = self._start()
        self.step = self._saved_step = int(self.state.step)
        # On CPU the scratch of a waiting step is allocated at once: two steps would hold it twice.
        self._dispatches_ahead = jax.default_backend() != "cpu"

    def run(self, log: MetricsLog | None, progress: RunProgress) -> None:
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
        moments = jax.eval_shape(self.optimizer.init, like)
        restored = self._restore(like, moments)
        if restored is None:
            return self._placed(init_state(self.job.fresh(), self.optimizer)), Totals()
        self.job.data.train.set_state(restored.data_state)
        state = TrainState(
            params=restored.params, moments=restored.moments, step=jnp.int32(restored.step)
        )
        return self._placed(state), Totals.from_json(restored.meta["totals"])

    def _restore(self, like: Tree, moments: Any) -> Restored | None:
        """What the first process reads, on all of them."""
        found = None if self.checkpoints is None else self.checkpoints.restore(like, moments)
        if jax.process_count() == 1:
            return found
        facts = json_from_first(
            found and {"step": found.step, "data": found.data_state, "meta": found.meta}
        )
        if facts is None:
            return None
        own = None if found is None else (found.params, found.moments)
        params, moments = from_first(own, (like, moments))
        return Restored(
            step=facts["step"],
            params=params,
            moments=moments,
            data_state=facts["data"],
            meta=facts["meta"],
        )

    def _placed(self, state: TrainState) -> TrainState:
        job, spread = self.job, self.config.devices.spread_adapter
        if job.mesh is None:
            return state
        return place_state(state, job.definition, job.mesh, job.trains, spread=spread)

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
            mesh=self.job.mesh,
            spread=self.config.devices.spread_adapter,
            skip_nonfinite=self.config.nonfinite == "skip",
            options=self.job.step,
        )
        batch = _abstract_batch(shape)
        if self.job.mesh is not None:
            batch = abstract_rows(batch, self.job.mesh)
        compiled = step.lower(self.state, self.job.frozen, batch, self._root).compile()
        self.compile_seconds = time.perf_counter() - start
        self.compiled = compiled_memory(compiled)
        release_free_memory()
        return compiled

    def _steps(self, compiled: jax.stages.Compiled) -> None:
        pending: _Pending | None = None
        while self.step < self.total_steps:
            batch = self._next_batch()
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
            self._agree()
            if evaluated or self._save_due() or self._stop:
                self._settle(pending)
                pending = None
                self._milestone()

    def _next_batch(self) -> Batch:
        """This process's rows, on its devices where there is a mesh."""
        batch = next(self.job.data.train)
        if self.job.mesh is None:
            return batch
        return place_rows(batch, self.config.dataset.batch_size, self.job.mesh)

    def _settle(self, pending: _Pending) -> None:
        """Reads a step's results and counts them; this waits for the step."""
        metrics = jax.device_get(pending.metrics)
        now = time.perf_counter()
        seconds, self._ready = now - self._ready, now
        loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._skip(pending.step, loss, grad_norm)
            return
        self._skipped = 0
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

    def _skip(self, step: int, loss: float, grad_norm: float) -> None:
        """Notes that a step's update was left out, or ends the run."""
        self._skipped += 1
        if self.config.nonfinite == "skip" and self._skipped < MOST_SKIPPED:
            self._progress.note(f"step {step}: loss {loss}, gradient norm {grad_norm}; not applied")
            return
        raise FabricError(
            f"training diverged in step {step}: loss {loss}, gradient norm {grad_norm}",
            fix="Lower the learning rate or lengthen the warm-up; the state was not saved, "
            "earlier checkpoints are intact",
        )

    def _milestone(self) -> None:
        """Evaluates, records and saves where that is due after the present step.

        A session that begins here does what an interrupt kept the last one from doing.
        """
        if self._evaluation_due() and self.totals.evaluated_step < self.step:
            self._evaluate()
        self._agree()
        if self._stop or self._save_due():
            self._save()
        if self._stop:
            self._leave(self._stop)
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
            if self._log is not None:
                self._log.write_first_evaluation(loss)
            self._progress.note(f"before training: eval loss {loss:.4f}")
        elif self.totals.logged_step < self.step:
            self._record(self.step, self.epoch, loss, bits)
        if self.step:
            self._sample()
        if improved and self.job.keep_best:
            self.export(f"{self.job.kind}_best")
        self._saved_step = -1

    def export(self, name: str) -> None:
        """Writes the trained tree into a folder of the output; all processes take part."""
        params = on_host(self.state.params)
        if is_first():
            self.job.export(self.output / name, params)

    def _sample(self) -> None:
        """Notes texts that the model writes; all processes take part."""
        if self.job.sample is None:
            return
        params = self.state.params
        if self.job.mesh is not None:
            params = jax.device_get(on_host(params))
        if is_first():
            for text in self.job.sample(self.step, params):
                self._progress.note(f"sample: {text}")

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
        if self._log is not None:
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
        if self._log is not None:
            self._log.sync()
        evaluated = self.totals.evaluated_step == self.step
        params, moments = on_host((self.state.params, self.state.moments))
        if self.checkpoints is not None:
            self.checkpoints.save(
                self.step,
                params,
                moments,
                data_state=self.job.data.train.get_state(),
                meta={"totals": self.totals.to_json()},
                metric=self.totals.eval_loss_last if evaluated else None,
            )
        self._saved_step = self.step

    def _leave(self, number: int) -> None:
        if self.checkpoints is not None:
            self.checkpoints.wait()
        saved = "before the first step, nothing to save" if self.step == 0 else "saved"
        raise Interrupted(
            f"stopped after step {self.step} of {self.total_steps}, {saved}. "
            f"To resume:\n  {self.job.resume_with}",
            number,
        )

    def _agree(self) -> None:
        """Whether a signal came to any process, so that all stop after the same step."""
        self._stop = largest(self._interrupts.received or 0) or None

    def _notify(self, number: int) -> None:
        self._progress.note("finishing the step and saving; once more to stop at once")

    def _until_stopped(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            # Processes that stop, stop after the same step.
            if self._interrupts.received and jax.process_count() == 1:
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
