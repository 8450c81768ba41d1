"""The training loop around a job: output folder, checkpoints, metrics, summary."""

import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import jax
from fabric_kernels.ternary_matmul import select_implementation
from flax import nnx
from rich.console import Console

from fabric_jax.checkpoints.train_state import TrainCheckpoints
from fabric_jax.data.batch import BatchSource
from fabric_jax.errors import FabricError
from fabric_jax.files import write_json
from fabric_jax.models.decoder import DecoderDefinition
from fabric_jax.models.on_mesh import place_base
from fabric_jax.parallel.mesh import MeshShape, make_mesh
from fabric_jax.parallel.placement import assembling, own_rows, shape_of, uncut_linears
from fabric_jax.parallel.processes import (
    FAILED_CODE,
    LOST_CODE,
    WRONG_CODE,
    chosen_mesh,
    is_first,
    leave,
    tells_of_lost_peer,
)
from fabric_jax.training.config import RunConfig
from fabric_jax.training.identity import run_identity
from fabric_jax.training.lock import locked_folder
from fabric_jax.training.memory_account import analytic_bytes, predict
from fabric_jax.training.metrics import MetricsLog
from fabric_jax.training.optimizer import describe_optimizer
from fabric_jax.training.out_of_memory import is_out_of_memory, out_of_memory
from fabric_jax.training.partition import freezes_a, trained_leaves
from fabric_jax.training.progress import RunProgress
from fabric_jax.training.session import Job, Session
from fabric_jax.training.summary import SUMMARY, Summary, machine, measured

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"


def train(
    config: RunConfig, prepare: Callable[[], Job], *, console: Console | None = None
) -> Summary:
    """Trains what ``prepare`` loads; resumes where ``config.resume`` says so.

    Args:
        config: of the run.
        prepare: loads model and data; called once the output folder is known to be free.
        console: where progress goes; standard error where not given.

    Returns:
        What is in ``summary.json`` too.

    Raises:
        FabricError: another run uses the folder, it holds a run that is not to be resumed or is
            another one, the data or model are wrong, or training diverged.
        Interrupted: Ctrl-C or SIGTERM; the state was saved.
    """
    console = console or Console(stderr=True)
    if jax.process_count() == 1:
        return _train(config, prepare, console)
    try:
        return _train(config, prepare, console if is_first() else Console(quiet=True))
    except FabricError as error:
        leave(str(error), WRONG_CODE)
    except Exception as error:
        if not tells_of_lost_peer(error):
            traceback.print_exc()
            leave(f"process {jax.process_index()} failed: {type(error).__name__}", FAILED_CODE)
        leave(
            f"process {jax.process_index()} lost the others: {str(error).splitlines()[0][:200]}. "
            "A process of the run died or can't be reached; what it printed last says why. "
            f"Start all of them again with --resume auto to continue {config.output}.",
            LOST_CODE,
        )


def _train(config: RunConfig, prepare: Callable[[], Job], console: Console) -> Summary:
    """:func:`train` in one process, or in one of several."""
    output = Path(config.output)
    with locked_folder(output) if is_first() else nullcontext():
        if config.resume == "never" and is_first():
            _refuse_overwriting(output)
        shape = chosen_mesh(config.devices, config.dataset.batch_size)
        with assembling(shape.devices):
            job = _on_devices(prepare(), shape)
        total = total_steps(config, job.data.train)
        _describe(console, config, job, total)
        try:
            with _checkpoints(config, job, total, console) as checkpoints:
                with assembling(shape.devices):
                    session = Session(config, job, total, checkpoints)
                _say_where(console, config, session)
                _run(session, console)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(config, job.definition, shape, fused=job.fused) from error
        session.export(job.kind)
        summary = _summarise(session)
        if is_first():
            write_json(output / SUMMARY, summary.to_json())
    return summary


def _checkpoints(
    config: RunConfig, job: Job, total: int, console: Console
) -> AbstractContextManager[TrainCheckpoints | None]:
    """The checkpoints of the run; None in processes that don't write."""
    if not is_first():
        return nullcontext()

    def report(text: str) -> None:
        console.print(f"warning: {text}", markup=False, highlight=False, soft_wrap=True)

    identity = run_identity(
        config,
        job.definition,
        job.data,
        trains=job.trains,
        weights=job.weights,
        total_steps=total,
        settings=job.settings,
    )
    folder = Path(config.output) / CHECKPOINTS
    return TrainCheckpoints(folder, keep_last=config.keep_last, identity=identity, report=report)


def _on_devices(job: Job, shape: MeshShape) -> Job:
    """The job with its base cut along the mesh, and this process's rows of the data."""
    if shape.devices == 1:
        return job
    mesh = make_mesh(shape)
    train, evaluation = job.data.train, job.data.evaluation
    for stream in (train, *([] if evaluation is None else [evaluation])):
        stream.take_share(*own_rows(stream.rows_in_micro_batch, mesh))
    frozen = job.frozen
    if job.trains == "adapter":
        frozen = place_base(frozen, job.definition, mesh)
    return replace(job, frozen=frozen, mesh=mesh)


def _say_where(console: Console, config: RunConfig, session: Session) -> None:
    """Writes the configuration; says where the run begins."""
    if is_first():
        write_json(session.output / CONFIG, asdict(config))
    if session.step:
        console.print(
            f"resuming after step {session.step} of {session.total_steps}", highlight=False
        )
    elif config.resume == "auto":
        console.print("no checkpoint to resume: starting anew", highlight=False)


def total_steps(config: RunConfig, stream: BatchSource) -> int:
    """Optimizer steps of a run: its epochs or tokens, cut off at ``max_steps`` if that is given."""
    if config.token_budget:
        dataset = config.dataset
        positions = config.accumulation * dataset.batch_size * dataset.max_length
        steps = -(-config.token_budget // positions)
    else:
        steps = stream.batches_in_epochs(config.epochs)
    return min(steps, config.max_steps) if config.max_steps else steps


def parameter_count(tree: object) -> int:
    """Elements of all arrays of a tree, abstract ones too."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _run(session: Session, console: Console) -> None:
    """Runs a session with its metrics and progress open."""
    log = None
    if is_first():
        log = MetricsLog(
            session.output,
            last_step=session.totals.logged_step,
            tensorboard=session.config.tensorboard,
        )
    try:
        with RunProgress(console, total_steps=session.total_steps, done=session.step) as progress:
            session.run(log, progress)
        if session.checkpoints is not None:
            session.checkpoints.wait()
    finally:
        if log is not None:
            log.close()


def _refuse_overwriting(output: Path) -> None:
    folder = output / CHECKPOINTS
    if folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir()):
        raise FabricError(
            f"{output} holds the checkpoints of a run",
            fix="Give --resume auto to continue it, or choose another --output",
        )


def _describe(console: Console, config: RunConfig, job: Job, total: int) -> None:
    """Prints what is about to happen."""
    definition, data = job.definition, job.data
    model = definition.config
    kernel = implementation(definition)
    lines = [
        f"model {model.name}: {model.parameters:,} parameters, {definition.options.mode} weights"
        + (f", ternary_matmul {kernel}" if kernel else ""),
        f"training {parameter_count(trained_shapes(job)):,} parameters of the {job.kind}",
        f"data {data.summary}",
    ]
    if data.evaluation_summary is not None:
        lines.append(f"evaluation {data.evaluation_summary}")
    needed = predicted_bytes(config, job) / 2**20
    each = "" if job.mesh is None else " on each device"
    lines.append(f"memory {needed:,.0f} MiB{each} by dimensions; `fabric-jax memory` itemises it")
    if job.mesh is not None:
        shape = shape_of(job.mesh)
        lines.append(
            f"mesh {shape} of {jax.device_count()} devices, {jax.process_count()} processes"
        )
        lines += uncut_linears(nnx.to_pure_dict(definition.base), shape)
    lines += [*job.notes, *unfinished_warmup(job, total)]
    lines += [f"{total:,} optimizer steps, {describe_optimizer(config.optimizer, total)}"]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def unfinished_warmup(job: Job, total: int) -> list[str]:
    """What to say of a run that ends before it quantises entirely."""
    warmup = job.step.quantization_warmup
    if warmup < total:
        return []
    return [
        f"warning: quantisation grows over {warmup:,} steps, more than this run has: its last step "
        f"trains at {(total - 1) / warmup:.0%} of it, while evaluation, samples and packed weights "
        "are quantised entirely. Give a shorter --quantization-warmup, or more steps"
    ]


def predicted_bytes(config: RunConfig, job: Job) -> int:
    """What the job needs by its dimensions."""
    dataset = config.dataset
    arrays, scratch = predict(
        job.definition,
        config.optimizer,
        rows=dataset.batch_size,
        length=dataset.max_length,
        fused=job.fused,
        mesh=None if job.mesh is None else shape_of(job.mesh),
        spread=config.devices.spread_adapter,
    )
    return analytic_bytes(arrays, scratch)


def trained_shapes(job: Job) -> object:
    """The abstract tree of what is trained."""
    definition = job.definition
    declared = definition.adapter if job.trains == "adapter" else definition.base
    freeze_a = freezes_a(definition, job.trains)
    return trained_leaves(nnx.to_pure_dict(declared), freeze_a=freeze_a)


def implementation(definition: DecoderDefinition) -> str | None:
    """The ``ternary_matmul`` that the model runs; None where no weight is packed."""
    options = definition.options
    return select_implementation(options.implementation) if options.mode == "packed" else None


def _summarise(session: Session) -> Summary:
    job, output, compiled = session.job, session.output, session.compiled
    options = job.definition.options
    best = output / f"{job.kind}_best"
    has_best = job.keep_best and session.totals.best_step is not None
    return Summary(
        output=str(output),
        trained=str(output / job.kind),
        best=str(best) if has_best else None,
        model=job.definition.config.name,
        parameters=job.definition.config.parameters,
        trained_parameters=parameter_count(trained_shapes(job)),
        epochs=session.epoch,
        compile_seconds=session.compile_seconds,
        analytic_bytes=predicted_bytes(session.config, job),
        compiled_bytes=None if compiled is None else compiled.total,
        compiled_temporary_bytes=None if compiled is None else compiled.temporaries,
        implementation=implementation(job.definition),
        packing=options.packing if options.mode == "packed" else None,
        **measured(session.totals),
        **machine(),
    )
