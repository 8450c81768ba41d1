"""The stages, each from files to files and through the functions that a user's run goes through."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console

from fabric_jax.checkpoints.loading import load_base
from fabric_jax.checkpoints.native import load_model_folder, save_model
from fabric_jax.checkpoints.peft import load_adapter, read_lora_config
from fabric_jax.data import DataConfig, load_evaluation, load_tokenizer
from fabric_jax.evaluation import AnswerBy, Comparison, compare
from fabric_jax.files import write_atomically
from fabric_jax.measurement.categories import MemoryByCategory, memory_by_category
from fabric_jax.quickstart.corpus import Corpus, Fact
from fabric_jax.quickstart.settings import Recipe
from fabric_jax.quickstart.vocabulary import train_vocabulary
from fabric_jax.training.config import FinetuneConfig, PretrainConfig
from fabric_jax.training.loop import finetune, pretrain
from fabric_jax.training.optimizer import make_optimizer
from fabric_jax.training.summary import Summary


@dataclass(frozen=True)
class Layout:
    """Where things lie in the output folder."""

    root: Path

    @property
    def statements(self) -> Path:
        """Rows that the base model is trained on."""
        return self.root / "data" / "statements.jsonl"

    @property
    def questions(self) -> Path:
        """Rows that the adapter is trained on."""
        return self.root / "data" / "questions.jsonl"

    @property
    def held_out(self) -> Path:
        """Rows for the evaluation."""
        return self.root / "data" / "held_out.jsonl"

    @property
    def tokenizer(self) -> Path:
        """The vocabulary, until the model's folder has it too."""
        return self.root / "tokenizer" / "tokenizer.json"

    @property
    def pretraining(self) -> Path:
        """Output of training from scratch; master weights are in ``model`` inside."""
        return self.root / "pretrain"

    @property
    def model(self) -> Path:
        """The packed model."""
        return self.root / "model"

    @property
    def finetuning(self) -> Path:
        """Output of LoRA; the adapter is in ``adapter`` inside."""
        return self.root / "finetune"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of a LoRA run by category: as it was, and with the base in 16-bit floats."""

    packed: MemoryByCategory
    f16: MemoryByCategory


def write_data(corpus: Corpus, layout: Layout) -> int:
    """Writes rows and vocabulary; returns the size of the vocabulary."""
    write_rows(layout.statements, ({"text": text} for text in corpus.statements))
    write_rows(layout.questions, map(question_row, corpus.train))
    write_rows(layout.held_out, map(question_row, corpus.held_out))
    write_atomically(layout.tokenizer, train_vocabulary(corpus.statements))
    return load_tokenizer(layout.tokenizer).vocab_size


def question_row(fact: Fact) -> dict[str, str]:
    """A row of the question about a fact, labelled with its answer."""
    return {"question": fact.question, "answer": fact.outcome, "label": fact.outcome}


def write_rows(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Writes rows as JSONL."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def train_from_scratch(
    layout: Layout, recipe: Recipe, *, vocab_size: int, seed: int, console: Console
) -> Summary:
    """Trains master weights on the statements."""
    config = PretrainConfig(
        model=recipe.model,
        vocab_size=vocab_size,
        output=str(layout.pretraining),
        dataset=DataConfig(
            data=str(layout.statements),
            tokenizer=str(layout.tokenizer),
            max_length=recipe.row_length,
            batch_size=recipe.pretrain_rows,
            data_seed=seed,
        ),
        optimizer=recipe.pretrain_optimizer,
        optimizer_defaults="plain",
        rows="packed",
        samples=0,
        epochs=recipe.pretrain_epochs,
        save_every=0,
        log_every=recipe.log_every,
        tensorboard=recipe.tensorboard,
        remat=recipe.remat,
        seed=seed,
    )
    return pretrain(config, console=console)


def pack(layout: Layout) -> None:
    """Packs the master weights into a model folder of their own."""
    loaded = load_base(layout.pretraining / "model")
    save_model(
        layout.model,
        loaded.definition,
        loaded.base,
        tokenizer_json=layout.tokenizer.read_bytes(),
    )


def finetune_config(layout: Layout, recipe: Recipe, *, seed: int) -> FinetuneConfig:
    """LoRA on the packed model and the questions."""
    return FinetuneConfig(
        model=str(layout.model),
        output=str(layout.finetuning),
        lora=recipe.lora,
        dataset=DataConfig(
            data=str(layout.questions),
            eval_data=str(layout.held_out),
            max_length=recipe.row_length,
            batch_size=recipe.finetune_rows,
            data_seed=seed,
        ),
        optimizer=recipe.finetune_optimizer,
        epochs=recipe.finetune_epochs,
        eval_every=recipe.eval_every,
        save_every=0,
        log_every=recipe.log_every,
        tensorboard=recipe.tensorboard,
        remat=recipe.remat,
        seed=seed,
    )


def fine_tune(config: FinetuneConfig, console: Console) -> Summary:
    """Trains the adapter."""
    return finetune(config, console=console)


def evaluate(layout: Layout, recipe: Recipe) -> dict[AnswerBy, Comparison]:
    """Asks the held-out questions without and with the adapter, both read back from disk."""
    adapter_folder = layout.finetuning / "adapter"
    loaded = load_base(layout.model, lora=read_lora_config(adapter_folder))
    tokenizer = load_tokenizer(loaded.tokenizer_source)
    rows = load_evaluation(
        DataConfig(data=str(layout.held_out), max_length=recipe.row_length), tokenizer
    )
    adapter = load_adapter(adapter_folder, loaded.definition)
    ways: tuple[AnswerBy, ...] = ("likelihood", "generation")
    return {
        by: compare(
            loaded.definition,
            loaded.base,
            adapter,
            tokenizer=tokenizer,
            labelled=rows.labelled,
            by=by,
            batch_size=len(rows.labelled),
        )
        for by in ways
    }


def measure_sizes(layout: Layout, config: FinetuneConfig, summary: Summary) -> Sizes:
    """Counts the bytes of the arrays, and of the same base's cast to float16."""
    adapter_folder = layout.finetuning / "adapter"
    packed = load_base(layout.model, lora=read_lora_config(adapter_folder))
    adapter = load_adapter(adapter_folder, packed.definition)
    moments = make_optimizer(config.optimizer, summary.steps).init(adapter)
    definition, master = load_model_folder(layout.pretraining / "model")
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), master)
    return Sizes(
        packed=memory_by_category(packed.definition, packed.base, adapter, moments).measured,
        f16=memory_by_category(definition, half, adapter, moments).measured,
    )
