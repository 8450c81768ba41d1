"""Published recipes for training all weights, as settings of the optimizer.

From scratch: BitNet b1.58's FAQ ("Training tips, code and FAQ", Ma et al. 2024): AdamW with betas
0.9 and 0.95, 375 steps of warm-up, two stages by learning rate and weight decay. Conversion:
HF1BitLLM's Llama3-8B-1.58 (1e-4, then down to 1e-5). Supervised fine-tuning: onebitllms' example
for Falcon-E. Continued training is the second stage of training from scratch.
"""

import dataclasses
from dataclasses import replace

from fabric_jax.training.config import OptimizerConfig, PretrainConfig

LAST_RATE = 3e-5
"""Where both lines of the published schedule end, as read off its figure."""


def published_peaks(parameters: int) -> tuple[float, float]:
    """Peak learning rates of the two stages by size; below 700M, which has its own, none is known.

    700M: 1.5e-3 and 1e-3; 1.3B, 3B and 3.9B: 1.2e-3 and 8e-4. Smaller models take those of 700M.
    """
    return (1.5e-3, 1e-3) if parameters < 1_000_000_000 else (1.2e-3, 8e-4)


def recipe_optimizer(recipe: str, parameters: int) -> OptimizerConfig:
    """The optimizer of a recipe for a model of that many parameters."""
    first, second = published_peaks(parameters)
    beta2 = 0.95
    match recipe:
        case "scratch":
            return OptimizerConfig(
                learning_rate=first,
                schedule="two-stage",
                second_learning_rate=second,
                min_learning_rate=LAST_RATE,
                warmup_steps=375,
                weight_decay=0.1,
                beta2=beta2,
            )
        case "continue":
            return OptimizerConfig(
                learning_rate=second, schedule="linear", min_learning_rate=LAST_RATE, beta2=beta2
            )
        case "convert":
            return OptimizerConfig(
                learning_rate=1e-4, schedule="linear", min_learning_rate=1e-5, beta2=beta2
            )
        case _:
            return OptimizerConfig(learning_rate=1e-4, schedule="linear", beta2=beta2)


def resolve(config: PretrainConfig, parameters: int) -> PretrainConfig:
    """The configuration with the optimizer of its recipe, changed by what differs from a default.

    A setting that is given counts, whatever the recipe says, unless it is the default's own value.
    Where the first stage has another peak, the second one's keeps its ratio to it, as published.
    """
    if config.optimizer_defaults == "plain":
        return config
    default, given = OptimizerConfig(), config.optimizer
    own = recipe_optimizer(config.recipe, parameters)
    changed = {
        field.name: getattr(given, field.name)
        for field in dataclasses.fields(given)
        if getattr(given, field.name) != getattr(default, field.name)
    }
    schedule = changed.get("schedule", own.schedule)
    if schedule != "two-stage":
        own = replace(own, schedule=schedule, second_learning_rate=0.0, second_weight_decay=0.0)
    if "warmup_ratio" in changed:
        own = replace(own, warmup_steps=0)  # Steps would go before the share.
    rate = changed.get("learning_rate", own.learning_rate)
    if own.second_learning_rate:
        second = own.second_learning_rate * rate / own.learning_rate
        own = replace(own, second_learning_rate=second)
    if "min_learning_rate" not in changed:
        own = replace(own, learning_rate=rate, min_learning_rate=min(own.min_learning_rate, rate))
    return replace(config, optimizer=replace(own, **changed), optimizer_defaults="plain")
