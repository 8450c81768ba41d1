"""Settings of training runs; every field is a flag of the command of the same name."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from fabric_kernels.ternary_matmul import GradientBits

from fabric_jax.choices import ImplementationChoice, TableDtype, WeightsChoice
from fabric_jax.data.config import DataConfig
from fabric_jax.errors import FabricError
from fabric_jax.layers.attention import AttentionChoice
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.decoder import Remat
from fabric_jax.parallel.processes import DevicesConfig
from fabric_jax.quantization.absmax import ActQuant
from fabric_jax.quantization.ste_options import SteOptions


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) and its learning rate.

    Attributes:
        learning_rate: peak, reached at the end of warm-up.
        schedule: what follows warm-up. two-stage: BitNet b1.58's from scratch, a line that falls
            from the peak to the end over the whole run, and from half of it on the line from
            second_learning_rate, with second_weight_decay.
        min_learning_rate: where the falling schedules end.
        second_learning_rate: peak of the second stage's line; only of two-stage.
        second_weight_decay: of the second stage; only of two-stage.
        warmup_steps: optimizer steps of linear warm-up from 0; at most a tenth of a two-stage run.
        warmup_ratio: the same as a share of all steps; used where ``warmup_steps`` is 0.
        weight_decay: decoupled; the gains of norms are left out.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        epsilon: added to the root of the second moment.
        clip_norm: gradients are scaled down to this global norm; 0 leaves them.
        moments: how both moments are kept between steps: in float32, 8 bytes a parameter, or as
            int8 blocks with scales, 2.03 bytes.
    """

    learning_rate: float = 2e-4
    schedule: Literal["constant", "linear", "cosine", "two-stage"] = "cosine"
    min_learning_rate: float = 0.0
    second_learning_rate: float = 0.0
    second_weight_decay: float = 0.0
    warmup_steps: int = 0
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip_norm: float = 1.0
    moments: Literal["float32", "int8"] = "float32"

    def __post_init__(self) -> None:
        """Refuses numbers that can't be meant."""
        _at_least_zero(
            learning_rate=self.learning_rate,
            min_learning_rate=self.min_learning_rate,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            second_learning_rate=self.second_learning_rate,
            second_weight_decay=self.second_weight_decay,
            epsilon=self.epsilon,
            clip_norm=self.clip_norm,
        )
        if self.min_learning_rate > self.learning_rate:
            raise FabricError(
                "the learning rate can't end above its peak",
                expected=f"min_learning_rate <= {self.learning_rate}",
                found=str(self.min_learning_rate),
            )
        if (self.schedule == "two-stage") != (self.second_learning_rate > 0):
            raise FabricError(
                "a second stage has a learning rate of its own",
                expected="schedule two-stage with a second_learning_rate, or neither",
                found=f"{self.schedule} and {self.second_learning_rate}",
            )
        if not 0 <= self.warmup_ratio <= 1:
            raise FabricError(
                "warmup_ratio is a share of all steps",
                expected="0 to 1",
                found=str(self.warmup_ratio),
            )
        for name in ("beta1", "beta2"):
            value: float = getattr(self, name)
            if not 0 <= value < 1:
                raise FabricError(
                    f"{name} out of range", expected=f"0 <= {name} < 1", found=str(value)
                )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training run has.

    Attributes:
        output: folder for checkpoints, metrics, summary and what was trained.
        dataset: rows, tokenizer, masks, lengths.
        optimizer: AdamW and its schedule.
        epochs: passes over the data.
        max_steps: stop after so many optimizer steps, even within the epochs; 0 for no limit.
        token_budget: positions to train on, over as many epochs as that takes; 0: epochs decide.
        accumulation: micro-batches summed into one optimizer step.
        eval_every: optimizer steps between evaluations; 0 for once an epoch.
        save_every: optimizer steps between checkpoints; 0 for only at the end. The best state and
            that of an interrupted run are saved whatever it says.
        keep_last: newest checkpoints kept, beside the best.
        log_every: optimizer steps between lines of metrics.
        tensorboard: whether to write TensorBoard events too.
        resume: ``auto`` continues the newest checkpoint in ``output``, if there is one; ``never``
            refuses to overwrite one.
        dtype: of activations and unpacked weights.
        act_quant: quantiser of the inputs of ternary linears; by default the one that the model
            was saved with, else per_token.
        remat: what the backward pass recomputes instead of keeping. int8-residuals keeps int8 codes
            of the outputs of linears: the same loss, gradients from rounded values. offload is
            layer with the layers' inputs in the host's memory, and the last layer kept, for GPUs
            with rows enough that copies hide behind the computation.
        seed: of adapter, dropout and random base weights.
        nonfinite: what a loss or gradient that is no number does: stop the run, or skip the update
            of that step; after ten skips in a row the run stops too. Neither is ever saved.
        devices: the mesh, and the processes of the run.
    """

    output: str
    dataset: DataConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    epochs: int = 1
    max_steps: int = 0
    token_budget: int = 0
    accumulation: int = 1
    eval_every: int = 0
    save_every: int = 100
    keep_last: int = 2
    log_every: int = 1
    tensorboard: bool = True
    resume: Literal["auto", "never"] = "never"
    dtype: Literal["float32", "bfloat16"] = "float32"
    act_quant: ActQuant | None = None
    remat: Remat = "linears"
    seed: int = 0
    nonfinite: Literal["stop", "skip"] = "stop"
    devices: DevicesConfig = field(default_factory=DevicesConfig)

    def __post_init__(self) -> None:
        """Refuses numbers that can't be meant."""
        _at_least_zero(
            max_steps=self.max_steps,
            token_budget=self.token_budget,
            eval_every=self.eval_every,
            save_every=self.save_every,
            seed=self.seed,
        )
        for name in ("epochs", "accumulation", "keep_last", "log_every"):
            value = getattr(self, name)
            if value < 1:
                raise FabricError(f"{name} out of range", expected="1 or more", found=str(value))


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """A LoRA fine-tuning run.

    Attributes:
        model: registry name (random weights), a folder saved by fabric_jax or by transformers, a
            .gguf file, or a hub id: org/name, org/name@revision, org/name/file.gguf.
        adapter: folder or .gguf file of an adapter to continue from, instead of a fresh one.
        lora: rank, alpha, targets and the like.
        weights: form of the base's linears; auto is packed where the model is ternary. packed for
            a checkpoint of plain floats says that these are master weights of a ternary model.
            packed is ternary2 (2 bits a weight); ternary1.6 holds five weights a byte, with the
            same results. float is plain linears in dtype; float32, bfloat16, float16, int8 and int4
            are plain linears that are stored so and multiplied in dtype.
        embedding_dtype: of embedding and head in memory; same is dtype. Half precision takes half
            the bytes and no more time on CPU; int8 and int4 take 8.5 and 4.5 bits a weight, rounded
            as GGUF's Q8_0 and Q4_0 are.
        gradient_bits: of gradients in the backward product through packed weights on CPU: 16 (fixed
            point) takes about two thirds of the time of 24, which is as exact as float32.
        implementation: of products with packed weights; auto picks the fastest there is.
        fused_update: update each layer's adapter within the backward pass, so that one layer's
            gradient exists at a time. Needs remat layer, accumulation 1, clip_norm 0 and nonfinite
            stop.
    """

    model: str
    adapter: str = ""
    lora: LoraConfig = field(default_factory=LoraConfig)
    weights: WeightsChoice = "auto"
    embedding_dtype: TableDtype = "same"
    gradient_bits: GradientBits = 16
    implementation: ImplementationChoice = "auto"
    fused_update: bool = False

    def __post_init__(self) -> None:
        """Refuses numbers that can't be meant."""
        super().__post_init__()
        if self.lora.rank == 0:
            raise FabricError("LoRA rank 0 trains nothing", fix="Give --rank 1 or more")
        if self.fused_update:
            check_fused(self.optimizer, self.remat, self.accumulation, self.nonfinite)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """Training of all weights: the ternary linears keep float32 masters, quantised in every step.

    Attributes:
        model: scratch: a registry name; otherwise what finetune takes. convert: a dense model;
            continue and sft: a packed model, or the masters of an earlier run (its folder).
        recipe: where weights come from and what they are trained for. scratch: random weights on
            text. convert: a dense model becomes ternary, quantised gradually. continue: a packed
            model goes on, from masters under which it computes what it did. sft: likewise on
            conversations and other rows with answers.
        optimizer_defaults: whether settings of the optimizer that are left at their default, or
            given with that very value, are the recipe's, as published, or plain AdamW's.
        vocab_size: scratch: rows of the embedding; 0 for the model's, or those that the tokenizer
            needs where that was learnt.
        num_layers: scratch: layers; 0 for the model's own.
        gate: scratch: activation of the gate: silu (arXiv:2402.17764), or relu2, the squared ReLU
            (BitNet b1.58 2B4T, arXiv:2504.12285); model for the model's own.
        sub_norms: scratch: whether there are norms before o and down, as in BitNet b1.58, or not,
            as in Falcon-E and HF1BitLLM's Llama3-8B-1.58; model for the model's own.
        ste: variants of the quantisers, for ablations.
        quantization_warmup: convert: steps over which quantisation grows from nothing to all.
        rows: stream: text is cut into rows as it lies, so that nothing is padded; packed: each row
            of the data is a document, truncated or split and packed, as in finetune. auto: stream,
            for sft packed.
        document_mask: stream: whether attention stays inside a document.
        corpus: stream: folder of the tokenised text, made where it isn't there yet and used again
            where it is; "" for one in output.
        train_tokenizer: stream: learn a BPE vocabulary of that size from the text; 0 for none.
        z_loss: weight of the squared log-partition in the loss, as PaLM's 1e-4; 0 for none.
        samples: texts to generate after each evaluation; into the log and samples.jsonl.
        sample_tokens: tokens of each.
        sample_prompt: what they begin with; "" for the begin of a text.
        attention: auto: our own. cudnn: cuDNN's, for bfloat16 on NVIDIA GPUs; cudnn-causal reads
            no mask, for stream without document_mask.
        loss_tile_mib: logits that exist at once, MiB; 0: 8 on CPU, 512 on accelerators.
        unroll: compile the layers one after another instead of as a loop: a faster step on
            accelerators, more memory under remat none, compilation that grows with depth.
    """

    model: str
    recipe: Literal["scratch", "convert", "continue", "sft"] = "scratch"
    optimizer_defaults: Literal["recipe", "plain"] = "recipe"
    vocab_size: int = 0
    num_layers: int = 0
    gate: Literal["model", "silu", "relu2"] = "model"
    sub_norms: Literal["model", "yes", "no"] = "model"
    ste: SteOptions = field(default_factory=SteOptions)
    quantization_warmup: int = 1000
    rows: Literal["auto", "stream", "packed"] = "auto"
    document_mask: bool = True
    corpus: str = ""
    train_tokenizer: int = 0
    z_loss: float = 0.0
    samples: int = 1
    sample_tokens: int = 48
    sample_prompt: str = ""
    attention: AttentionChoice = "auto"
    loss_tile_mib: int = 0
    unroll: bool = False

    def __post_init__(self) -> None:
        """Refuses numbers that can't be meant."""
        super().__post_init__()
        _at_least_zero(
            vocab_size=self.vocab_size,
            num_layers=self.num_layers,
            quantization_warmup=self.quantization_warmup,
            train_tokenizer=self.train_tokenizer,
            z_loss=self.z_loss,
            samples=self.samples,
            loss_tile_mib=self.loss_tile_mib,
        )
        if self.train_tokenizer and self.dataset.tokenizer:
            raise FabricError("a tokenizer is either named or learnt", fix="Keep one of the two")
        if self.train_tokenizer and not self.streams:
            raise FabricError("only the text of a stream can teach a vocabulary")
        for name, only in _OF_ROWS.items():
            if self.streams and getattr(self.dataset, name) not in only:
                raise FabricError(
                    f"text that is cut into rows as it lies knows no {name}",
                    expected=f"{name} {only[0]} with rows stream",
                    found=str(getattr(self.dataset, name)),
                    fix="Give --rows packed for documents one by one",
                )
        if not self.streams and (self.corpus or not self.document_mask):
            raise FabricError(
                "documents one by one are read from no corpus, and never see one another",
                expected="corpus and no-document-mask with rows stream alone",
                fix="Give --rows stream, or leave them out",
            )
        if self.attention == "cudnn-causal" and (self.document_mask or not self.streams):
            raise FabricError(
                "cudnn-causal attention lets a token see all before it in its row",
                expected="rows stream and no document_mask",
                fix="Give --no-document-mask",
            )

    @property
    def streams(self) -> bool:
        """Whether rows are cut from a corpus."""
        return self.rows == "stream" or (self.rows == "auto" and self.recipe != "sft")


_OF_ROWS: dict[str, tuple[Any, ...]] = {
    "packing": (True,),
    "long_rows": ("truncate",),
    "train_on": ("auto", "all"),
}
"""Settings of ``DataConfig`` that are of rows which are documents, and what a stream can have."""


def check_fused(
    optimizer: OptimizerConfig, remat: Remat, accumulation: int = 1, nonfinite: str = "stop"
) -> None:
    """Refuses what an update within the backward pass can't do.

    Raises:
        FabricError: a setting needs all gradients at once, or keeps more than layers' inputs, or
            the weights as they were.
    """
    for name, value, needed in (
        ("clip_norm", optimizer.clip_norm, 0),
        ("remat", remat, "layer"),
        ("accumulation", accumulation, 1),
        ("nonfinite", nonfinite, "stop"),
    ):
        if value != needed:
            raise FabricError(
                "a fused update has one layer's gradient at a time",
                expected=f"{name} {needed}",
                found=str(value),
                fix=f"Give --{name.replace('_', '-')} {needed}, or leave out --fused-update",
            )


def _at_least_zero(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise FabricError(f"{name} out of range", expected="0 or more", found=str(value))
