"""Settings of a fine-tuning run; every field is a flag of ``fabric-jax finetune``."""

from dataclasses import dataclass, field
from typing import Literal

from fabric_jax.data.config import DataConfig
from fabric_jax.errors import FabricError
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.decoder import Remat
from fabric_jax.quantization.absmax import ActQuant


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) and its learning rate.

    Attributes:
        learning_rate: peak, reached at the end of warm-up.
        schedule: what follows warm-up.
        min_learning_rate: where the linear and cosine schedules end.
        warmup_steps: optimizer steps of linear warm-up from 0.
        warmup_ratio: the same as a share of all steps; used where ``warmup_steps`` is 0.
        weight_decay: decoupled.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        epsilon: added to the root of the second moment.
        clip_norm: gradients are scaled down to this global norm; 0 leaves them.
    """

    learning_rate: float = 2e-4
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    min_learning_rate: float = 0.0
    warmup_steps: int = 0
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        """Refuses numbers that can't be meant."""
        _at_least_zero(
            learning_rate=self.learning_rate,
            min_learning_rate=self.min_learning_rate,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
        )
        if self.min_learning_rate > self.learning_rate:
            raise FabricError(
                "the learning rate can't end above its peak",
                expected=f"min_learning_rate <= {self.learning_rate}",
                found=str(self.min_learning_rate),
            )
        if not 0 <= self.warmup_ratio <= 1:
            raise FabricError(
                "warmup_ratio is a share of all steps",
                expected="0 to 1",
                found=str(self.warmup_ratio),
            )


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """A LoRA fine-tuning run.

    Attributes:
        model: registry name (random weights) or a folder saved by fabric_jax.
        output: folder for checkpoints, adapter, metrics and summary.
        adapter: folder of an adapter to continue from, instead of a fresh one.
        lora: rank, alpha, targets and the like.
        dataset: rows, tokenizer, masks, lengths.
        optimizer: AdamW and its schedule.
        epochs: passes over the data.
        max_steps: stop after so many optimizer steps; 0 for no limit.
        accumulation: micro-batches summed into one optimizer step.
        eval_every: optimizer steps between evaluations; 0 for once an epoch.
        save_every: optimizer steps between checkpoints; 0 for only at the end.
        keep_last: newest checkpoints kept, beside the best.
        log_every: optimizer steps between lines of metrics.
        resume: ``auto`` continues the newest checkpoint in ``output``; ``never`` refuses to
            overwrite one.
        dtype: of activations and unpacked weights.
        act_quant: quantiser of the inputs of ternary linears.
        remat: what the backward pass recomputes instead of keeping.
        seed: of adapter, dropout and random base weights.
    """

    model: str
    output: str
    adapter: str = ""
    lora: LoraConfig = field(default_factory=LoraConfig)
    dataset: DataConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    epochs: int = 1
    max_steps: int = 0
    accumulation: int = 1
    eval_every: int = 0
    save_every: int = 100
    keep_last: int = 2
    log_every: int = 1
    resume: Literal["auto", "never"] = "never"
    dtype: Literal["float32", "bfloat16"] = "float32"
    act_quant: ActQuant = "per_token"
    remat: Remat = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses numbers that can't be meant."""
        _at_least_zero(
            max_steps=self.max_steps, eval_every=self.eval_every, save_every=self.save_every
        )
        for name in ("epochs", "accumulation", "keep_last", "log_every"):
            value = getattr(self, name)
            if value < 1:
                raise FabricError(f"{name} out of range", expected="1 or more", found=str(value))
        if self.lora.rank == 0:
            raise FabricError("LoRA rank 0 trains nothing", fix="Give --rank 1 or more")


def _at_least_zero(**values: float) -> None:
    for name, value in values.items():
        if value < 0:
            raise FabricError(f"{name} out of range", expected="0 or more", found=str(value))
