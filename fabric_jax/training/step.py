"""One optimizer step: the only place where gradients are taken."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int32

from fabric_jax.data.batch import Batch
from fabric_jax.errors import FabricError
from fabric_jax.models.decoder import DecoderDefinition
from fabric_jax.models.initialize import Tree
from fabric_jax.models.offload import COMPILER_OPTIONS
from fabric_jax.parallel.placement import shape_of
from fabric_jax.training.fused_step import fused_update
from fabric_jax.training.on_mesh import GradientSum, constrain_state, over_devices
from fabric_jax.training.on_mesh import Trains as Trains
from fabric_jax.training.optimizer import to_float32
from fabric_jax.training.partition import freezes_a, join, split
from fabric_jax.training.rounding import apply_updates


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How the loss of a step is computed, beside the model.

    Attributes:
        z_loss: weight of the squared log-partition, see ``layers.cross_entropy``.
        quantization_warmup: steps over which masters and their inputs are quantised ever more:
            ``min(step / warmup, 1)``, steps counted from 0; 0 for entirely from the first.
    """

    z_loss: float = 0.0
    quantization_warmup: int = 0

    def strength(self, step: Int32[Array, ""]) -> Float32[Array, ""] | None:
        """How far this step quantises; None for entirely, in every step."""
        if not self.quantization_warmup:
            return None
        return jnp.minimum(step.astype(jnp.float32) / self.quantization_warmup, 1.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that a step changes.

    Attributes:
        params: the trained tree.
        moments: the optimizer's state for it.
        step: optimizer steps done.
    """

    params: Tree
    moments: Any
    step: Int32[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What one step reports; all on the device until read.

    Attributes:
        loss: mean loss of the trainable tokens before the update, nats.
        trainable_tokens: targets with weight in the loss.
        real_tokens: positions that are not padding.
        grad_norm: global norm of the gradient before clipping.
    """

    loss: Float32[Array, ""]
    trainable_tokens: Float32[Array, ""]
    real_tokens: Int32[Array, ""]
    grad_norm: Float32[Array, ""]


class TrainStep(Protocol):
    """A compiled optimizer step."""

    def __call__(
        self, state: TrainState, frozen: Tree, batch: Batch, root_key: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        """The next state and what the step reports."""
        ...

    def lower(
        self, state: TrainState, frozen: Tree, batch: Batch, root_key: jax.Array
    ) -> jax.stages.Lowered:
        """The program for arguments like these, to be compiled ahead of the first step."""
        ...


def init_state(params: Tree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(params=params, moments=optimizer.init(params), step=jnp.int32(0))


def make_train_step(
    definition: DecoderDefinition,
    optimizer: optax.GradientTransformation,
    *,
    trains: Trains = "adapter",
    fused: bool = False,
    options: StepOptions | None = None,
    mesh: Mesh | None = None,
    spread: bool = False,
    skip_nonfinite: bool = False,
) -> TrainStep:
    """The compiled step ``(state, frozen, batch, root_key) -> (state, metrics)``.

    ``batch`` has a leading axis of micro-batches: arrays [A, B, T]. Their loss sums and gradients
    are added, then divided by the number of trainable tokens in all of them, so that every token
    weighs the same wherever it lies. Random numbers come from ``root_key`` folded with the step
    and the micro-batch. ``state`` is donated: its buffers become those of the new state.

    Where the adapter's A is frozen (``LoraConfig.freeze_a``), gradients are taken by B alone; the
    optimizer must have been made for that.

    ``fused`` updates each layer's adapter within the backward pass (``fused_step.py``): one
    micro-batch, no clipping by the global norm, and the pass recomputes all but layers' inputs.

    With a ``mesh`` of several devices losses and gradients are computed within one ``shard_map``,
    where each device has its rows and its parts of the base, and summed over the devices once a
    step; arguments lie where ``training.on_mesh`` puts them. The update is XLA's to partition, and
    ``spread`` cuts an adapter and its moments along the devices that have other rows.

    With ``skip_nonfinite`` a step whose loss or gradient is not finite leaves parameters and
    moments as they were; the step counts all the same.

    Neither these nor ``options`` are for a fused update.

    Raises:
        FabricError: a fused update on a mesh.
    """
    if fused:
        return _fused_step(definition, optimizer, mesh)

    freeze_a, options = freezes_a(definition, trains), options or StepOptions()
    summed = _gradient_sum(definition, trains, options, mesh)

    @partial(jax.jit, donate_argnums=(0,), compiler_options=_compiler_options(definition))
    def step(
        state: TrainState, frozen: Tree, batch: Batch, root_key: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(root_key, state.step)
        trained, kept = split(state.params, freeze_a=freeze_a)
        strength = options.strength(state.step)
        total, grads = summed((trained, kept), frozen, batch, key, strength)
        tokens = jnp.sum(batch.loss_mask)
        share = 1.0 / jnp.maximum(tokens, 1.0)
        grads = jax.tree.map(lambda g: g * share, grads)
        updates, moments = optimizer.update(grads, state.moments, trained)
        params = join(apply_updates(trained, cast(Tree, updates), key), kept)
        metrics = StepMetrics(
            loss=total * share,
            trainable_tokens=tokens,
            real_tokens=jnp.sum(batch.segment_ids > 0, dtype=jnp.int32),
            grad_norm=optax.tree.norm(grads),
        )
        if skip_nonfinite:
            params, moments = _if_finite(metrics, (params, moments), state)
        done = TrainState(params=params, moments=moments, step=state.step + 1)
        if mesh is not None:
            done = constrain_state(done, definition, mesh, trains, spread=spread)
        return done, metrics

    return step


def _compiler_options(definition: DecoderDefinition) -> dict[str, str] | None:
    on_gpu = jax.default_backend() == "gpu"
    return COMPILER_OPTIONS if on_gpu and definition.options.remat == "offload" else None


def _if_finite(metrics: StepMetrics, new: tuple[Tree, Any], state: TrainState) -> tuple[Tree, Any]:
    """Parameters and moments after a step, or those before it."""
    fine = jnp.isfinite(metrics.loss) & jnp.isfinite(metrics.grad_norm)
    old = (state.params, state.moments)
    return jax.tree.map(lambda a, b: jnp.where(fine, a, b), new, old)


def _gradient_sum(
    definition: DecoderDefinition, trains: Trains, options: StepOptions, mesh: Mesh | None
) -> GradientSum:
    """The sums of losses and gradients of all micro-batches, over all devices of a mesh."""
    if mesh is not None:
        definition = definition.on_mesh(shape_of(mesh))

    gradient = _gradient_of(definition, trains, options)

    def summed(
        parts: tuple[Tree, Tree],
        frozen: Tree,
        batch: Batch,
        key: jax.Array,
        strength: jax.Array | None,
    ) -> tuple[jax.Array, Tree]:
        return _sum_micro_batches(
            lambda micro, k: gradient(parts, frozen, micro, k, strength), batch, key
        )

    if mesh is None or mesh.size == 1:
        return summed
    return over_devices(summed, definition, mesh, trains)


def _gradient_of(
    definition: DecoderDefinition, trains: Trains, options: StepOptions
) -> GradientSum:
    """Loss sum and float32 gradients of a micro-batch, by the first of two trees of params."""

    def loss_sum(
        own: Tree,
        kept: Tree,
        frozen: Tree,
        batch: Batch,
        key: jax.Array,
        strength: jax.Array | None,
    ) -> jax.Array:
        params = join(own, kept)
        base, adapter = (frozen, params) if trains == "adapter" else (params, frozen)
        decoder = definition.bind(base, adapter)
        hidden = decoder(batch.tokens, batch.positions, batch.segment_ids, key, strength)
        return decoder.loss(
            hidden,
            batch.targets,
            batch.loss_mask,
            train_head=trains == "base",
            z_loss=options.z_loss,
        )

    def gradient(
        parts: tuple[Tree, Tree],
        frozen: Tree,
        batch: Batch,
        key: jax.Array,
        strength: jax.Array | None,
    ) -> tuple[jax.Array, Tree]:
        loss, grads = jax.value_and_grad(loss_sum)(*parts, frozen, batch, key, strength)
        return loss, to_float32(grads)

    return gradient


def _fused_step(
    definition: DecoderDefinition, optimizer: optax.GradientTransformation, mesh: Mesh | None
) -> TrainStep:
    if mesh is not None and mesh.size > 1:
        raise FabricError(
            "a fused update runs on one device",
            found=f"a mesh of {mesh.size}",
            fix="Leave out --fused-update, or --mesh",
        )

    @partial(jax.jit, donate_argnums=(0,))
    def step(
        state: TrainState, frozen: Tree, batch: Batch, root_key: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        if batch.tokens.shape[0] != 1:
            raise ValueError(f"a fused update takes one micro-batch, found {batch.tokens.shape[0]}")
        key = jax.random.fold_in(root_key, state.step)
        micro = jax.tree.map(lambda x: x[0], batch)
        params, moments, total, grad_norm = fused_update(
            definition, optimizer, state.params, state.moments, frozen, micro, key
        )
        tokens = jnp.sum(batch.loss_mask)
        metrics = StepMetrics(
            loss=total / jnp.maximum(tokens, 1.0),
            trainable_tokens=tokens,
            real_tokens=jnp.sum(batch.segment_ids > 0, dtype=jnp.int32),
            grad_norm=grad_norm,
        )
        return TrainState(params=params, moments=moments, step=state.step + 1), metrics

    return step


def _sum_micro_batches(
    gradient: Callable[[Batch, jax.Array], tuple[jax.Array, Tree]], batch: Batch, key: jax.Array
) -> tuple[jax.Array, Tree]:
    """Loss sum and gradient sum over the leading axis; one micro-batch needs no accumulator."""
    count = batch.tokens.shape[0]
    if count == 1:
        return gradient(jax.tree.map(lambda x: x[0], batch), key)

    def add(
        total: tuple[jax.Array, Tree], part: tuple[Batch, jax.Array]
    ) -> tuple[tuple[jax.Array, Tree], None]:
        micro, index = part
        return jax.tree.map(jnp.add, total, gradient(micro, jax.random.fold_in(key, index))), None

    first = jax.tree.map(lambda x: x[0], batch)
    shapes = jax.eval_shape(gradient, first, key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return lax.scan(add, zeros, (batch, jnp.arange(count, dtype=jnp.int32)))[0]
