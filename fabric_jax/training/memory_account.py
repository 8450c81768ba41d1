"""The memory of a LoRA fine-tuning job: by dimensions, as compiled, and as a device saw it."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from fabric_kernels.ternary_matmul import select_implementation
from flax import nnx
from jax.sharding import Mesh

from fabric_jax.checkpoints.assemble import in_form
from fabric_jax.checkpoints.loading import open_source, weights_form
from fabric_jax.choices import ImplementationChoice, TableDtype, WeightsChoice
from fabric_jax.data.batch import Batch
from fabric_jax.errors import FabricError
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.measurement.categories import (
    CompiledMemory,
    MemoryByCategory,
    compiled_memory,
    predict_memory,
)
from fabric_jax.measurement.driver import DriverPeak, driver_bytes
from fabric_jax.measurement.memory import (
    current_memory_bytes,
    peak_memory_bytes,
    release_free_memory,
    reset_peak_memory,
)
from fabric_jax.measurement.step_scratch import StepScratch, predict_scratch
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderDefinition, DecoderOptions, Remat, define_decoder
from fabric_jax.models.initialize import Tree, initialize_adapter, initialize_base
from fabric_jax.models.on_mesh import abstract_base, base_shardings
from fabric_jax.models.registry import REGISTRY
from fabric_jax.parallel.mesh import MeshShape, make_mesh, parse_mesh
from fabric_jax.parallel.placement import (
    base_specs,
    bytes_on_device,
    place_rows,
    spread_specs,
    uncut_linears,
)
from fabric_jax.training.config import OptimizerConfig, check_fused
from fabric_jax.training.on_mesh import abstract_rows, abstract_state, place_state
from fabric_jax.training.optimizer import make_optimizer
from fabric_jax.training.step import TrainState, init_state, make_train_step

PUBLISHED = (
    *("bitnet-125m", "bitnet-350m", "bitnet-1b", "bitnet-1.5b", "bitnet-2.7b", "bitnet-3.8b"),
    *("bitnet-7b", "bitnet-13b"),
)
"""The sizes of the published tables, smallest first."""
STEPS_OF_SCHEDULE = 100


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """A LoRA job whose memory is asked for.

    Attributes:
        model: registry name, or a folder, .gguf file or hub id, of which only the dimensions are
            read; a measurement takes random weights in any case.
        lora: rank, targets and the like.
        optimizer: AdamW.
        weights: form of the base's linears; auto is packed where the model is ternary. packed is
            ternary2 (2 bits a weight); ternary1.6 holds five weights a byte. float is plain linears
            in dtype; float32, bfloat16, float16, int8 and int4 are plain linears stored so.
        dtype: of activations and unpacked weights.
        embedding_dtype: of embedding and head in memory; same is dtype.
        remat: what the backward pass recomputes instead of keeping. int8-residuals keeps int8 codes
            of the outputs of linears; offload is layer with layers' inputs in the host's memory
            and the last layer kept.
        implementation: of products with packed weights; auto picks the fastest there is.
        fused_update: whether each layer's adapter is updated within the backward pass.
        max_length: positions in a row.
        batch_size: rows in a micro-batch, on all devices together.
        mesh: how many devices lie along data, fsdp and tensor, as in data=4,fsdp=2,tensor=2; the
            figures are then those of each device. The devices need not be there to predict.
        spread_adapter: whether adapter and moments are cut over the devices too.
        compile: whether to compile the step for this machine's device, which allocates nothing.
        steps: training steps to run on random rows for the device's own peak; 0 for none. On an
            accelerator the peak is that of the process: measure one job in each.
        fits: instead of one model, the largest published size that fine-tunes in so many GiB.
        json: a file for the figures, besides the printed table.
    """

    model: str = ""
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    weights: WeightsChoice = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    embedding_dtype: TableDtype = "same"
    remat: Remat = "linears"
    implementation: ImplementationChoice = "auto"
    fused_update: bool = False
    max_length: int = 128
    batch_size: int = 1
    mesh: str = ""
    spread_adapter: bool = False
    compile: bool = True
    steps: int = 0
    fits: float = 0.0
    json: str = ""

    def __post_init__(self) -> None:
        """Refuses numbers that can't be meant."""
        for name in ("max_length", "batch_size"):
            if getattr(self, name) < 1:
                raise FabricError(
                    f"{name} out of range", expected="1 or more", found=str(getattr(self, name))
                )
        if self.lora.rank == 0:
            raise FabricError("LoRA rank 0 trains nothing", fix="Give --rank 1 or more")
        if self.steps < 0 or self.fits < 0:
            raise FabricError("steps and fits are 0 or more")
        if bool(self.model) == bool(self.fits):
            raise FabricError("memory is asked of one --model, or of --fits GiB")
        if self.fused_update:
            check_fused(self.optimizer, self.remat)
        self.mesh_shape.require_rows(self.batch_size)

    @property
    def mesh_shape(self) -> MeshShape:
        """The mesh; one device where none is named."""
        return parse_mesh(self.mesh, None)


@dataclass(frozen=True, kw_only=True)
class MeasuredMemory:
    """The peak of a device while the job ran on it.

    Attributes:
        peak: bytes, raw: of the allocator on an accelerator, of the resident set on CPU.
        baseline: bytes before the job, after the backend had started.
        driver_peak: of the whole GPU as its driver counts; None where it doesn't.
        driver_baseline: the same before the job.
        steps: how many were run.
    """

    peak: int
    baseline: int
    driver_peak: int | None
    driver_baseline: int | None
    steps: int

    @property
    def above_baseline(self) -> int:
        """What the job added."""
        return self.peak - self.baseline


@dataclass(frozen=True, kw_only=True)
class MemoryAccount:
    """One job's memory in up to three columns.

    Attributes:
        model: its name.
        platform: of the device that compiled and ran.
        arrays: analytic bytes of base, adapter, optimizer and gradients.
        scratch: analytic bytes of intermediate arrays.
        compiled: XLA's own plan; None where nothing was compiled.
        measured: None where nothing was run.
        mesh: whose devices each need that much.
        notes: what a reader should know of them.
    """

    model: str
    platform: str
    arrays: MemoryByCategory
    scratch: StepScratch
    compiled: CompiledMemory | None
    measured: MeasuredMemory | None
    mesh: str = ""
    notes: tuple[str, ...] = ()

    @property
    def analytic(self) -> int:
        """Bytes of the job by its dimensions."""
        return analytic_bytes(self.arrays, self.scratch)

    @property
    def analytic_step(self) -> int:
        """Of what a compiled step counts as temporaries: gradients and intermediate arrays."""
        return (self.arrays.gradients or 0) + self.scratch.total

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self) | {"analytic_total": self.analytic}


def analytic_bytes(arrays: MemoryByCategory, scratch: StepScratch) -> int:
    """All of a job by its dimensions: arrays, gradients, intermediate arrays."""
    gradients = arrays.gradients or 0
    return arrays.base + arrays.adapters + arrays.optimizer + gradients + scratch.total


def account(config: MemoryConfig) -> MemoryAccount:
    """Predicts, compiles and measures, as far as ``config`` asks for it.

    Raises:
        FabricError: the model is unknown or can't be had in that form.
    """
    definition = _define(config)
    baseline = _start_backend()
    shape = config.mesh_shape
    arrays, scratch = predict(
        definition,
        config.optimizer,
        rows=config.batch_size,
        length=config.max_length,
        fused=config.fused_update,
        mesh=shape,
        spread=config.spread_adapter,
    )
    notes = uncut_linears(nnx.to_pure_dict(definition.base), shape)
    compiled = measured = None
    if config.compile or config.steps:
        if shape.devices > jax.device_count():
            notes.append(f"not compiled: {jax.device_count()} of {shape.devices} devices are here")
        else:
            step = _compile(definition, config)
            compiled = compiled_memory(step)
            if config.steps:
                measured = _measure(definition, config, step, baseline)
    return MemoryAccount(
        model=definition.config.name,
        platform=jax.default_backend(),
        arrays=arrays,
        scratch=scratch,
        compiled=compiled,
        measured=measured,
        mesh=str(shape) if shape.devices > 1 else "",
        notes=tuple(notes),
    )


def largest_that_fits(config: MemoryConfig) -> list[tuple[str, int]]:
    """Published sizes whose analytic memory is at most ``fits`` GiB, with their bytes."""
    found: list[tuple[str, int]] = []
    for name in PUBLISHED:
        one = replace(config, model=name, fits=0.0, compile=False, steps=0)
        total = account(one).analytic
        if total <= config.fits * 2**30:
            found.append((name, total))
    return found


def predict(
    definition: DecoderDefinition,
    optimizer: OptimizerConfig,
    *,
    rows: int,
    length: int,
    fused: bool,
    mesh: MeshShape | None = None,
    spread: bool = False,
) -> tuple[MemoryByCategory, StepScratch]:
    """The analytic column of a job on micro-batches of ``rows`` rows of ``length`` positions.

    The optimizer's bytes are those of its own abstract state. With a mesh they are those of each
    device; ``spread`` cuts adapter and moments too.
    """
    mesh = mesh or MeshShape()
    declared = definition.adapter if definition.options.lora.rank else definition.base
    like: Tree = nnx.to_pure_dict(declared)
    freeze_a = definition.options.lora.freeze_a
    made = make_optimizer(optimizer, STEPS_OF_SCHEDULE, freeze_a=freeze_a)
    moments = jax.eval_shape(made.init, like)
    arrays = predict_memory(definition.config, definition.options)
    gradients = arrays.gradients or 0
    base: Tree = nnx.to_pure_dict(definition.base)
    ternary = definition.options.mode != "float"
    cut, whole = (
        bytes_on_device(base, base_specs(base, shape, ternary=ternary), shape)
        for shape in (mesh, MeshShape())
    )
    state_mesh = mesh if spread else MeshShape()
    adapter, optimizer_bytes = (
        bytes_on_device(tree, spread_specs(tree, state_mesh), state_mesh)
        for tree in (nnx.to_pure_dict(definition.adapter), moments)
    )
    arrays = replace(
        arrays,
        weights=arrays.weights - (whole - cut),
        adapters=adapter,
        gradients=gradients // definition.config.num_layers if fused else gradients,
        optimizer=optimizer_bytes,
    )
    options = definition.options
    packed = options.mode == "packed"
    scratch = predict_scratch(
        definition.config,
        options,
        rows=rows,
        length=length,
        kernels=packed and select_implementation(options.implementation) == "cpu",
        mesh=mesh,
    )
    return arrays, scratch


def _optimizer(config: MemoryConfig) -> optax.GradientTransformation:
    return make_optimizer(config.optimizer, STEPS_OF_SCHEDULE, freeze_a=config.lora.freeze_a)


def _define(config: MemoryConfig) -> DecoderDefinition:
    form = weights_form(config.weights)
    mode = form.mode
    model: ModelConfig
    if config.model in REGISTRY:
        model = REGISTRY[config.model]
        mode = mode or ("packed" if model.ternary else "float")
    else:
        stored = in_form(open_source(config.model, mode=mode), mode)
        model, mode = stored.config, stored.form
    if config.max_length > model.max_length:
        raise FabricError(
            f"rows are longer than {model.name} allows",
            expected=f"max_length of at most {model.max_length}",
            found=str(config.max_length),
        )
    options = DecoderOptions(
        mode=mode,
        packing=form.packing,
        float_format=form.float_format,
        dtype=config.dtype,
        implementation=None if config.implementation == "auto" else config.implementation,
        remat=config.remat,
        lora=config.lora,
        embedding_dtype=None if config.embedding_dtype == "same" else config.embedding_dtype,
    )
    return define_decoder(model, options)


def _start_backend() -> tuple[int, int | None]:
    """Bytes in use once the backend runs and has done something; the driver's count too."""
    jax.block_until_ready(jnp.zeros((), jnp.float32) + 1)
    release_free_memory()
    return current_memory_bytes(), driver_bytes()


def _compile(definition: DecoderDefinition, config: MemoryConfig) -> jax.stages.Compiled:
    """The step, from shapes alone: what autotuning tries out is gone before weights are made."""
    optimizer = _optimizer(config)
    adapter: Tree = nnx.to_pure_dict(definition.adapter)
    state = jax.eval_shape(lambda params: init_state(params, optimizer), adapter)
    frozen: Tree = nnx.to_pure_dict(definition.base)
    key = jax.eval_shape(lambda: jax.random.key(0))
    shape = (1, config.batch_size, config.max_length)
    batch = jax.eval_shape(lambda: _batch(shape, definition.config.vocab_size))
    mesh = _mesh(config)
    if mesh is not None:
        spread = config.spread_adapter
        state = abstract_state(state, definition, mesh, "adapter", spread=spread)
        frozen = abstract_base(definition, mesh)
        batch = abstract_rows(cast(Batch, batch), mesh)
    step = make_train_step(
        definition, optimizer, fused=config.fused_update, mesh=mesh, spread=config.spread_adapter
    )
    return step.lower(
        cast(TrainState, state), frozen, cast(Batch, batch), cast(jax.Array, key)
    ).compile()


def _mesh(config: MemoryConfig) -> Mesh | None:
    """The devices of the mesh; None for one device."""
    shape = config.mesh_shape
    return make_mesh(shape) if shape.devices > 1 else None


def _measure(
    definition: DecoderDefinition,
    config: MemoryConfig,
    step: jax.stages.Compiled,
    baseline: tuple[int, int | None],
) -> MeasuredMemory:
    """Makes random weights and runs the compiled step."""
    mesh = _mesh(config)
    where = None if mesh is None else base_shardings(definition, mesh)
    frozen = initialize_base(definition, 0, shardings=where)
    optimizer = _optimizer(config)
    state = init_state(initialize_adapter(definition, 0), optimizer)
    batch = _batch((1, config.batch_size, config.max_length), definition.config.vocab_size)
    if mesh is not None:
        spread = config.spread_adapter
        state = place_state(state, definition, mesh, "adapter", spread=spread)
        batch = place_rows(batch, config.batch_size, mesh)
    jax.block_until_ready((frozen, state))
    # The programs that made the weights are done with, and so is their scratch.
    jax.clear_caches()
    release_free_memory()
    reset_peak_memory()
    with DriverPeak() as driver:
        for _ in range(config.steps):
            state, metrics = step(state, frozen, batch, jax.random.key(0))
            loss = float(metrics.loss)
            if not np.isfinite(loss):
                raise FabricError(f"the measured step gave a loss of {loss}")
    return MeasuredMemory(
        peak=peak_memory_bytes(),
        baseline=baseline[0],
        driver_peak=driver.peak,
        driver_baseline=baseline[1],
        steps=config.steps,
    )


def _batch(shape: tuple[int, int, int], vocabulary: int) -> Batch:
    """Rows full of random tokens, one document each."""
    tokens = jax.random.randint(jax.random.key(1), shape, 0, vocabulary, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), shape)
    return Batch(
        tokens=tokens,
        targets=jnp.roll(tokens, -1, axis=-1),
        loss_mask=jnp.ones(shape, jnp.float32),
        segment_ids=jnp.ones(shape, jnp.int32),
        positions=jnp.array(positions),
    )
