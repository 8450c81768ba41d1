"""AdamW with warm-up and decay, in optax."""

import optax

from fabric_jax.training.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate by optimizer step: linear from 0 to the peak, then the named schedule.

    Step 0 already moves: warm-up over w steps gives the first one peak / w. The decay ends at
    ``min_learning_rate`` on the last of ``total_steps``.
    """
    warmup = config.warmup_steps or round(config.warmup_ratio * total_steps)
    peak, last = config.learning_rate, config.min_learning_rate
    decay_steps = max(1, total_steps - warmup)
    match config.schedule:
        case "constant":
            after = optax.constant_schedule(peak)
        case "linear":
            after = optax.linear_schedule(peak, last, decay_steps)
        case "cosine":
            after = optax.cosine_decay_schedule(peak, decay_steps, alpha=last / peak if peak else 0)
    if warmup == 0:
        return after
    rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW on that schedule."""
    adamw = optax.adamw(
        learning_rate_schedule(config, total_steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )
    if config.clip_norm == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
