"""AdamW with warm-up and decay, in optax."""

from contextlib import AbstractContextManager
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from fabric_jax.errors import unknown_name
from fabric_jax.models.initialize import Tree
from fabric_jax.training.blockwise import scale_by_adam_8bit
from fabric_jax.training.config import OptimizerConfig
from fabric_jax.training.partition import trained_leaves

SCHEDULES = ("constant", "linear", "cosine", "two-stage")


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate by the number of optimizer steps done.

    Warm-up over w steps gives the first step peak / w and the w-th the peak. The decay then starts
    from the peak and would reach ``min_learning_rate`` one step after the last of ``total_steps``,
    so that no step is spent at zero.
    """
    warmup = warmup_steps(config, total_steps)
    peak, last = config.learning_rate, config.min_learning_rate
    if config.schedule == "two-stage":
        return _two_stages(config, total_steps)
    decay_steps = max(1, total_steps - warmup)
    match config.schedule:
        case "constant":
            after = optax.constant_schedule(peak)
        case "linear":
            after = optax.linear_schedule(peak, last, decay_steps)
        case "cosine":
            after = optax.cosine_decay_schedule(peak, decay_steps, alpha=last / peak if peak else 0)
        case _:
            raise unknown_name("schedule", config.schedule, SCHEDULES)
    if warmup:
        rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
        after = optax.join_schedules([rise, after], [warmup])

    def schedule(done: jax.typing.ArrayLike) -> jax.Array:
        with _optax_promotion():
            return jnp.asarray(after(cast(jax.Array, done)), jnp.float32)

    return schedule


def warmup_steps(config: OptimizerConfig, total_steps: int) -> int:
    """Optimizer steps of warm-up.

    Under ``two-stage`` at most a tenth of all: the published number is for 100,000 steps.
    """
    steps = config.warmup_steps or round(config.warmup_ratio * total_steps)
    return min(steps, total_steps // 10) if config.schedule == "two-stage" else steps


def describe_optimizer(config: OptimizerConfig, total_steps: int) -> str:
    """What a run's updates come to, in a line; a recipe decides more than the user gave."""
    rate, decay = f"learning rate {config.learning_rate:g}", f"weight decay {config.weight_decay:g}"
    if config.schedule == "two-stage":
        rate += f", from half of the run {config.second_learning_rate:g}"
        decay += f", then {config.second_weight_decay:g}"
    if config.schedule != "constant":
        rate += f", to {config.min_learning_rate:g}"
    warmup = warmup_steps(config, total_steps)
    return f"{config.schedule}: {rate}; warm-up steps {warmup:,}; {decay}"


def weight_decay_schedule(config: OptimizerConfig, total_steps: int) -> float | optax.Schedule:
    """Decoupled weight decay by the number of optimizer steps done; a number where it is one."""
    if config.schedule != "two-stage":
        return config.weight_decay
    first, second = config.weight_decay, config.second_weight_decay

    def schedule(done: jax.typing.ArrayLike) -> jax.Array:
        return jnp.where(jnp.asarray(done) < total_steps // 2, jnp.float32(first), second)

    return schedule


def _two_stages(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """The learning rate of BitNet b1.58's recipe (its FAQ, "Training details").

    With w steps of warm-up and T of all, step t (from 0) has ``peak_1 · (t + 1) / w`` below w, and
    ``peak_s + (last - peak_s) · (t - w) / (T - w)`` from there: two lines that would end together
    at the end of the run, s = 1 before T/2 and s = 2 after, where the rate drops at once.
    """
    warmup, last = warmup_steps(config, total_steps), config.min_learning_rate
    span = max(1, total_steps - warmup)

    def schedule(done: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(done).astype(jnp.float32)
        early = jnp.asarray(done) < total_steps // 2
        peak = jnp.where(early, jnp.float32(config.learning_rate), config.second_learning_rate)
        falling = peak + (last - peak) * (step - warmup) / span
        rising = config.learning_rate * (step + 1) / max(1, warmup)
        return jnp.where(step < warmup, rising, falling)

    return schedule


def make_optimizer(
    config: OptimizerConfig, total_steps: int, *, freeze_a: bool = False
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW on that schedule; all of it computed in float32.

    With ``freeze_a`` an adapter's A has no state and no share in the norm, and its update is None.
    """
    scale = scale_by_adam_8bit if config.moments == "int8" else optax.scale_by_adam
    # What optax.adamw is made of.
    adamw = optax.chain(
        scale(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
        optax.add_decayed_weights(weight_decay_schedule(config, total_steps), _decays),
        optax.scale_by_learning_rate(learning_rate_schedule(config, total_steps)),
    )
    if config.clip_norm:
        adamw = optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
    whole = _in_float32(adamw)
    return _without_a(whole) if freeze_a else whole


def to_float32(tree: Any) -> Any:
    """The tree with every leaf in float32; float32 leaves are passed on as they are."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _decays(params: Any) -> Any:
    """Which leaves weight decay is for: all but the gains of norms."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "norm" not in jax.tree_util.keystr(path), cast(Tree, params)
    )


def _without_a(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """``inner`` on the leaves that are trained where an adapter's A is frozen."""

    def init(params: Any) -> Any:
        return inner.init(trained_leaves(params, freeze_a=True))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        grads, weights = (trained_leaves(tree, freeze_a=True) for tree in (updates, params))
        return inner.update(grads, state, weights)

    return optax.GradientTransformation(init, update)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """``inner`` on float32 copies, so that moments and updates of bfloat16 weights aren't rounded.

    In bfloat16 a second moment with beta2 = 0.999 stops moving: the steps are below its precision.
    """

    def init(params: Any) -> Any:
        return inner.init(to_float32(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with _optax_promotion():
            return inner.update(to_float32(updates), state, to_float32(params))

    return optax.GradientTransformation(init, update)


def _optax_promotion() -> AbstractContextManager[None]:
    """JAX's standard promotion, which optax counts on when it mixes step numbers with floats."""
    return jax.numpy_dtype_promotion("standard")
