"""What a run trains on and how rows become batches."""

from dataclasses import dataclass
from typing import Literal

from fabric_jax.errors import FabricError

LongRows = Literal["truncate", "split", "drop"]
TrainOn = Literal["auto", "all", "assistant", "completion"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where rows come from, which of their tokens are trained on, how they fill batches."""

    data: str
    """Rows to train on: a .jsonl, .json or .parquet file, a folder of them, or a data set of the
    Hugging Face hub as org/name[/configuration][@revision][:split] (split "train" by default), or
    stdlib: source and documentation of this Python's standard library."""

    eval_data: str = ""
    """Rows to evaluate on, given like data (hub split "validation" by default)."""

    eval_fraction: float = 0.0
    """Share of the training rows to set aside for evaluation when eval_data is empty; rows with
    labels are set aside class by class, equal rows stay on one side."""

    tokenizer: str = ""
    """A tokenizer folder, tokenizer.json, tokenizer.model, .gguf file or hub id[@revision]. Empty:
    the model's own, or bytes for a model that has none."""

    chat_template: str = ""
    """A Jinja file to use instead of the tokenizer's own chat template."""

    columns: tuple[str, ...] = ()
    """Columns to read under other names, as known=column, e.g. prompt=subject completion=body."""

    max_length: int = 512
    """Positions in a row."""

    batch_size: int = 1
    """Rows in a micro-batch."""

    packing: bool = True
    """Fill rows with several documents, first-fit; they never attend to each other. Off: one
    document a row."""

    long_rows: LongRows = "truncate"
    """What to do with rows longer than max_length."""

    train_on: TrainOn = "auto"
    """Tokens with a loss. auto: assistant turns of messages, completions and answers, all of text.
    completion on messages: the last assistant turn; on labelled text: what follows "A:"."""

    shuffle: bool = True
    """A new order each epoch, from data_seed."""

    data_seed: int = 0
    """Seed of the order of rows and of the evaluation split."""

    def __post_init__(self) -> None:
        """Refuses values that can't work, so that no file is read first."""
        for name, low in (("max_length", 1), ("batch_size", 1), ("data_seed", 0)):
            value: int = getattr(self, name)
            if value < low:
                raise FabricError(
                    f"{name} is too small", expected=f"{low} or more", found=str(value)
                )
        if not 0 <= self.eval_fraction < 1:
            raise FabricError(
                "eval_fraction is out of range",
                expected="0 or more, less than 1",
                found=str(self.eval_fraction),
            )
        if self.eval_data and self.eval_fraction:
            raise FabricError(
                "eval_data and eval_fraction are both given", fix="Keep one of the two"
            )
