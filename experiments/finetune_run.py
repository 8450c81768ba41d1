"""A whole fine-tuning run as a cell: loss, accuracy on held-out questions, speed, memory.

For the experiments about quality. By default the model and the questions are those that ``make
quickstart`` leaves in ``runs/quickstart``: a small ternary model that was trained from scratch on
facts, and questions about them with the answers Yes, No and Uncertain.
"""

import tempfile
from dataclasses import dataclass
from typing import Any, Literal

from experiments.job import small_share
from fabric_jax.sweeps import runs_alone


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run.

    Attributes:
        model: what ``fabric-jax finetune`` takes.
        data: rows to train on.
        eval_data: labelled rows to be answered.
        tokenizer: empty for the model's own.
        steps: optimizer steps.
        rows: in a batch.
        length: positions in a row.
        rank: of LoRA.
        alpha: 0 for twice the rank.
        targets: linears with an adapter.
        rslora: scale by the root of the rank.
        freeze_a: train B alone.
        dropout: of the adapter's input.
        learning_rate: the peak.
        moments: how AdamW keeps them.
        adapter_dtype: of the adapter's weights.
        weights: form of the base's linears.
        embedding_dtype: of embedding and head.
        act_quant: quantiser of activations.
        remat: what the backward pass recomputes.
        seed: of adapter, dropout and order.
    """

    model: str = "runs/quickstart/model"
    data: str = "runs/quickstart/data/questions.jsonl"
    eval_data: str = "runs/quickstart/data/held_out.jsonl"
    tokenizer: str = ""
    steps: int = 400
    rows: int = 8
    length: int = 64
    rank: int = 8
    alpha: float = 0.0
    targets: tuple[str, ...] = ("all",)
    rslora: bool = False
    freeze_a: bool = False
    dropout: float = 0.0
    learning_rate: float = 2e-3
    moments: Literal["float32", "int8"] = "float32"
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    weights: Literal["auto", "ternary2", "ternary1.6"] = "auto"
    embedding_dtype: Literal["same", "float16", "bfloat16", "int8", "int4"] = "same"
    act_quant: Literal["per_token", "block256", "none"] = "per_token"
    remat: Literal["none", "linears", "int8-residuals", "layer", "offload"] = "linears"
    seed: int = 0


QUALITY = ("accuracy", "eval_loss", "loss", "step_seconds", "compiled_bytes")
TIMES = (
    *("step_seconds", "trainable_tokens_per_second", "real_tokens_per_second"),
    "positions_per_second",
)


def environment(cell: RunConfig, platform: str) -> dict[str, str]:
    """Runs of the quickstart's model fit beside one another; another model has the device."""
    return small_share(platform) if cell.model == RunConfig.model else {}


def measure(cell: RunConfig) -> dict[str, Any]:
    """Fine-tunes and answers the held-out questions, which are read back through the folder.

    Times are None where other cells run beside this one.
    """
    from rich.console import Console

    from fabric_jax.training.loop import finetune

    with tempfile.TemporaryDirectory() as folder:
        job = job_config(cell, f"{folder}/run")
        summary = finetune(job, console=Console(stderr=True))
        scores = answered(cell, job, summary.trained) if cell.eval_data else {}
    metrics = scores | {
        "loss": summary.loss_last,
        "eval_loss": summary.eval_loss_last,
        "eval_loss_best": summary.eval_loss_best,
        "steps": summary.steps,
        "trained_parameters": summary.trained_parameters,
        "step_seconds": summary.seconds_per_step,
        "trainable_tokens_per_second": summary.trainable_tokens_per_second,
        "real_tokens_per_second": summary.tokens_per_second,
        "positions_per_second": summary.positions_per_second,
        "compiled_bytes": summary.compiled_bytes,
        "compiled_temporary_bytes": summary.compiled_temporary_bytes,
        "peak_bytes": summary.peak_bytes,
        "implementation": summary.implementation,
    }
    # Beside other cells a step takes as long as they let it.
    return metrics if runs_alone() else metrics | dict.fromkeys(TIMES)


def job_config(cell: RunConfig, output: str) -> Any:
    """The ``FinetuneConfig`` of a cell."""
    from fabric_jax.data.config import DataConfig
    from fabric_jax.layers.lora import LoraConfig
    from fabric_jax.training.config import FinetuneConfig, OptimizerConfig

    return FinetuneConfig(
        model=cell.model,
        output=output,
        lora=LoraConfig(
            rank=cell.rank,
            alpha=cell.alpha or 2.0 * cell.rank,
            targets=cell.targets,
            rslora=cell.rslora,
            freeze_a=cell.freeze_a,
            dropout=cell.dropout,
            adapter_dtype=cell.adapter_dtype,
        ),
        dataset=DataConfig(
            data=cell.data,
            eval_data=cell.eval_data,
            tokenizer=cell.tokenizer,
            max_length=cell.length,
            batch_size=cell.rows,
            data_seed=cell.seed,
        ),
        optimizer=OptimizerConfig(
            learning_rate=cell.learning_rate,
            schedule="linear",
            warmup_ratio=0.05,
            beta2=0.95,
            moments=cell.moments,
        ),
        weights=cell.weights,
        embedding_dtype=cell.embedding_dtype,
        act_quant=cell.act_quant,
        remat=cell.remat,
        seed=cell.seed,
        epochs=10_000,
        max_steps=cell.steps,
        eval_every=cell.steps,
        save_every=0,
        log_every=20,
        tensorboard=False,
    )


def answered(cell: RunConfig, job: Any, folder: str) -> dict[str, Any]:
    """Accuracy with its 95 % Wilson interval, by the likeliest of the answers."""
    from fabric_jax.checkpoints.loading import load_base, weights_form
    from fabric_jax.checkpoints.peft import load_adapter
    from fabric_jax.data import DataConfig, load_evaluation, load_tokenizer
    from fabric_jax.evaluation import make_accuracy_task

    form = weights_form(cell.weights)
    loaded = load_base(
        cell.model,
        lora=job.lora,
        mode=form.mode,
        packing=form.packing,
        act_quant=cell.act_quant,
        embedding_dtype=None if cell.embedding_dtype == "same" else cell.embedding_dtype,
        seed=cell.seed,
    )
    tokenizer = load_tokenizer(cell.tokenizer or loaded.tokenizer_source)
    data = load_evaluation(DataConfig(data=cell.eval_data, max_length=cell.length), tokenizer)
    task = make_accuracy_task(loaded.definition, tokenizer, data.labelled, by="likelihood")
    scores = task(loaded.base, load_adapter(folder, loaded.definition)).scores
    low, high = scores.interval
    return {
        "accuracy": scores.accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "macro_f1": scores.macro_f1,
        "questions": scores.total,
    }
