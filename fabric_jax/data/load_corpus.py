"""From a configuration to a token stream: the vocabulary, the corpus on disk, batches."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fabric_jax.data.bpe import train_bpe
from fabric_jax.data.config import DataConfig
from fabric_jax.data.corpus import (
    TOKENIZER,
    Corpus,
    CorpusSettings,
    TokenSplit,
    check_corpus,
    is_corpus,
    open_corpus,
    write_corpus,
)
from fabric_jax.data.load import Data, read_rows
from fabric_jax.data.rows import Row
from fabric_jax.data.summary import DataSummary
from fabric_jax.data.token_stream import TokenStream
from fabric_jax.data.tokenizer import Tokenizer, load_tokenizer
from fabric_jax.files import alone


def corpus_tokenizer(folder: Path, config: DataConfig, *, size: int, own: str) -> Tokenizer:
    """The vocabulary of a corpus: that in its folder, a named one, or one learnt from the rows.

    Args:
        folder: of the corpus; once it is there, a learnt vocabulary is read from it.
        config: names rows and tokenizer.
        size: of a vocabulary to learn; 0 for none.
        own: the model's tokenizer, where ``config`` names none and none is learnt.
    """
    template = config.chat_template or None
    if not size:
        return load_tokenizer(config.tokenizer or own, chat_template=template)
    if is_corpus(folder):
        return load_tokenizer(folder / TOKENIZER, chat_template=template)
    texts = (row.text for row in read_rows(config.data, config, split="train"))
    # Nowhere it could be found again: other text or another size would be learnt from in vain.
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / TOKENIZER
        file.write_bytes(train_bpe(texts, largest=size))
        tokenizer = load_tokenizer(file, chat_template=template)
    return replace(tokenizer, source=f"learnt from {config.data}")


def prepare_corpus(
    folder: Path, config: DataConfig, tokenizer: Tokenizer, *, learnt: int = 0
) -> Corpus:
    """The corpus in ``folder``, tokenised from the configured rows where it isn't there yet.

    Which documents are held out depends on their contents alone: runs whose rows come in another
    order are evaluated on the same ones. Of processes that want it at once, one makes it.

    Args:
        folder: of the corpus.
        config: names the rows.
        tokenizer: the vocabulary.
        learnt: the size that was asked for where the tokenizer was learnt from the rows, else 0.

    Raises:
        FabricError: the folder holds another corpus, or the rows are missing or malformed.
    """
    settings = CorpusSettings(
        source=config.data,
        held_out_source=config.eval_data,
        held_out=config.eval_fraction,
        columns=config.columns,
        vocabulary=learnt,
    )
    if not is_corpus(folder):
        with alone(folder.with_name(f".{folder.name}.lock")):
            if not is_corpus(folder):
                aside: Iterator[Row] = iter(())
                if config.eval_data:
                    aside = read_rows(config.eval_data, config, split="validation")
                rows = read_rows(config.data, config, split="train")
                return write_corpus(folder, settings, rows, tokenizer, held_out_rows=aside)
    check_corpus(folder, settings, tokenizer.fingerprint)
    return open_corpus(folder)


def stream_data(
    corpus: Corpus,
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    accumulation: int = 1,
    document_mask: bool = True,
) -> Data:
    """Batches cut from a corpus.

    Args:
        corpus: the tokens.
        config: length and number of rows, order.
        tokenizer: for the summary.
        accumulation: A, micro-batches in a training batch.
        document_mask: whether attention stays inside a document.
    """
    seed = config.data_seed if config.shuffle else None

    def stream(split: TokenSplit, accumulation: int | None, seed: int | None) -> TokenStream:
        return TokenStream(
            split,
            length=config.max_length,
            rows=config.batch_size,
            accumulation=accumulation,
            seed=seed,
            document_mask=document_mask,
            corpus=corpus.digest,
        )

    def summary(split: TokenSplit, rows: TokenStream, source: str) -> DataSummary:
        untrained = len(split.starts) if document_mask else 1
        return _summarise(split, rows, source, config, tokenizer, untrained)

    train, held_out = stream(corpus.train, accumulation, seed), corpus.held_out
    kept = None if held_out is None else stream(held_out, None, None)
    source = config.eval_data or f"{config.data} ({config.eval_fraction:g} held out)"
    return Data(
        train=train,
        evaluation=kept,
        labelled=(),
        summary=summary(corpus.train, train, config.data),
        evaluation_summary=(
            None if held_out is None or kept is None else summary(held_out, kept, source)
        ),
        fingerprint=train.fingerprint,
        evaluation_bytes=None if held_out is None else held_out.text_bytes,
    )


def _summarise(
    split: TokenSplit,
    stream: TokenStream,
    source: str,
    config: DataConfig,
    tokenizer: Tokenizer,
    untrained: int,
) -> DataSummary:
    """Counts of a split, of whose tokens ``untrained`` are never targets."""
    documents, specials = len(split.starts), int(tokenizer.add_bos) + (tokenizer.eos_id is not None)
    lengths = [*split.starts[1:].tolist(), split.tokens]
    longest = max(end - start for start, end in zip(split.starts.tolist(), lengths, strict=True))
    positions = stream.row_count * config.max_length
    return DataSummary(
        source=source,
        rows_read=documents,
        rows_kept=documents,
        rows_truncated=0,
        rows_split=0,
        kinds={"text": documents},
        documents=documents,
        packed_rows=stream.row_count,
        text_tokens=split.tokens - specials * documents,
        tokens=split.tokens,
        trainable_tokens=split.tokens - untrained,
        padding_share=1 - (split.tokens - 1) / positions,
        longest_row=longest,
        tokenizer=tokenizer.source,
    )
