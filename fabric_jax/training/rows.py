"""The data of a run, with a tokenizer and rows that its model can take."""

from pathlib import Path

from fabric_jax.data.load import Data, load_data
from fabric_jax.data.load_corpus import corpus_tokenizer, prepare_corpus, stream_data
from fabric_jax.data.tokenizer import Tokenizer, load_tokenizer
from fabric_jax.errors import FabricError
from fabric_jax.models.config import ModelConfig
from fabric_jax.training.config import PretrainConfig, RunConfig

CORPUS = "corpus"


def load_rows(config: RunConfig, model: ModelConfig, own_tokenizer: str) -> tuple[Data, Tokenizer]:
    """Rows as documents, packed.

    Args:
        config: of the run.
        model: what is trained.
        own_tokenizer: the model's, used where the run names none.
    """
    check_length(config, model)
    dataset = config.dataset
    tokenizer = load_tokenizer(
        dataset.tokenizer or own_tokenizer, chat_template=dataset.chat_template or None
    )
    check_vocabulary(tokenizer, model)
    return load_data(dataset, tokenizer, accumulation=config.accumulation), tokenizer


def stream_tokenizer(config: PretrainConfig, own_tokenizer: str) -> Tokenizer:
    """The vocabulary of a stream: named, learnt from its text, or the model's."""
    return corpus_tokenizer(
        corpus_folder(config), config.dataset, size=config.train_tokenizer, own=own_tokenizer
    )


def load_stream(config: PretrainConfig, model: ModelConfig, tokenizer: Tokenizer) -> Data:
    """Rows cut from a corpus, which is tokenised where it isn't there yet."""
    check_length(config, model)
    check_vocabulary(tokenizer, model)
    corpus = prepare_corpus(
        corpus_folder(config), config.dataset, tokenizer, learnt=config.train_tokenizer
    )
    return stream_data(
        corpus,
        config.dataset,
        tokenizer,
        accumulation=config.accumulation,
        document_mask=config.document_mask,
    )


def corpus_folder(config: PretrainConfig) -> Path:
    """Where the tokenised text lies."""
    return Path(config.corpus or Path(config.output) / CORPUS).expanduser()


def check_length(config: RunConfig, model: ModelConfig) -> None:
    """Refuses rows longer than the model's positions."""
    if config.dataset.max_length > model.max_length:
        raise FabricError(
            f"rows are longer than {model.name} allows",
            expected=f"max_length of at most {model.max_length}",
            found=str(config.dataset.max_length),
        )


def check_vocabulary(tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Refuses a tokenizer with ids that the embedding has no row for."""
    if tokenizer.vocab_size > model.vocab_size:
        raise FabricError(
            f"the tokenizer {tokenizer.source} has more tokens than {model.name}",
            expected=f"at most {model.vocab_size}",
            found=str(tokenizer.vocab_size),
            fix="Use the tokenizer that the model was made with",
        )
