"""Sizes and rates of the quickstart, chosen so that it takes minutes on two CPU cores."""

from dataclasses import dataclass, field

from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.decoder import Remat
from fabric_jax.training.config import OptimizerConfig


def _training_from_scratch() -> OptimizerConfig:
    """High rate, decay, short memory: what suits straight-through training (BitNet b1.58's FAQ)."""
    return OptimizerConfig(
        learning_rate=2e-3,
        schedule="linear",
        warmup_ratio=0.05,
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.95,
    )


def _fine_tuning() -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=2e-3, schedule="linear", warmup_ratio=0.05, beta1=0.9, beta2=0.95
    )


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """What the user may choose.

    Attributes:
        output: folder for everything the run makes; an earlier quickstart there is replaced.
        seed: of facts, weights and orders.
    """

    output: str = "runs/quickstart"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How much is trained, and how.

    Attributes:
        model: registry name.
        drugs: with two facts about each.
        held_out: facts of each relation and outcome that are asked for in the evaluation.
        row_length: positions in a row, which sentences are packed into.
        pretrain_epochs: passes over the statements from random weights.
        pretrain_rows: rows a step.
        pretrain_optimizer: AdamW and its schedule there.
        finetune_epochs: passes of LoRA over the questions.
        finetune_rows: rows a step.
        finetune_optimizer: AdamW and its schedule there.
        lora: the adapter.
        remat: what backward passes recompute. On CPU it is faster to compute norms and gates twice
            than to get memory for them from the system in every step.
        log_every: steps between lines of metrics.
        eval_every: LoRA steps between losses of the held-out questions.
        tensorboard: whether both runs write TensorBoard events too.
    """

    model: str = "bitnet-tiny"
    drugs: int = 150
    held_out: int = 20
    row_length: int = 64
    pretrain_epochs: int = 24
    pretrain_rows: int = 16
    pretrain_optimizer: OptimizerConfig = field(default_factory=_training_from_scratch)
    finetune_epochs: int = 32
    finetune_rows: int = 8
    finetune_optimizer: OptimizerConfig = field(default_factory=_fine_tuning)
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=8, alpha=16.0, dropout=0.1))
    remat: Remat = "linears"
    log_every: int = 20
    eval_every: int = 40
    tensorboard: bool = True
