"""The one entry to the data: from a configuration and a tokenizer to batches."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fabric_jax.data.batch import BatchSource
from fabric_jax.data.batch_stream import BatchShape, BatchStream
from fabric_jax.data.config import DataConfig
from fabric_jax.data.documents import Fitted, fit_documents
from fabric_jax.data.rows import Row, parse_columns, parse_row, rename
from fabric_jax.data.sources import read_records
from fabric_jax.data.split import split_rows
from fabric_jax.data.summary import DataSummary
from fabric_jax.data.tokenize_rows import LabelledRow, TokenizedRows, tokenize_rows
from fabric_jax.data.tokenizer import Tokenizer
from fabric_jax.errors import FabricError


@dataclass(frozen=True, kw_only=True)
class Data:
    """All that a run reads.

    Attributes:
        train: batches [A, B, T] of training rows, epoch after epoch.
        evaluation: batches [B, T] of evaluation rows in the order of the source, None without any.
        labelled: evaluation rows with a class, for task accuracy.
        summary: what became of the training rows.
        evaluation_summary: the same of the evaluation rows.
        fingerprint: digest of rows, settings and tokenizer; equal ones give equal batches.
        evaluation_bytes: UTF-8 bytes of the text behind all evaluation targets, for bits per byte;
            None where it isn't known.
    """

    train: BatchSource
    evaluation: BatchSource | None
    labelled: tuple[LabelledRow, ...]
    summary: DataSummary
    evaluation_summary: DataSummary | None
    fingerprint: str
    evaluation_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationData:
    """Rows to evaluate on.

    Attributes:
        batches: [B, T], in the order of the source.
        labelled: rows with a class, for task accuracy.
        summary: what became of the rows.
    """

    batches: BatchStream
    labelled: tuple[LabelledRow, ...]
    summary: DataSummary


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Rows of a source that are used for one purpose."""

    rows: TokenizedRows
    chosen: NDArray[np.int64]
    source: str


def load_data(config: DataConfig, tokenizer: Tokenizer, *, accumulation: int = 1) -> Data:
    """Reads, tokenises and splits the data.

    Args:
        config: what to read and how.
        tokenizer: the vocabulary.
        accumulation: A, micro-batches in a training batch.

    Raises:
        FabricError: a source is missing, malformed or empty, or nothing in it is trained on.
    """
    train, evaluation = _parts(config, tokenizer)
    fingerprint = _fingerprint(config, tokenizer, train.rows, accumulation)
    shape = _batch_shape(config, tokenizer, accumulation)
    seed = config.data_seed if config.shuffle else None
    fitted = _fit(train, config, "train")
    stream = BatchStream(fitted.documents, shape, seed=seed, fingerprint=fingerprint)
    summary = _summarise(train, fitted, stream, config, tokenizer)
    if evaluation is None:
        return Data(
            train=stream,
            evaluation=None,
            labelled=(),
            summary=summary,
            evaluation_summary=None,
            fingerprint=fingerprint,
        )
    held_out = _evaluation(evaluation, shape, config, tokenizer, fingerprint)
    training_keys = set(train.rows.keys[train.chosen].tolist())
    shared = sum(key in training_keys for key in evaluation.rows.keys[evaluation.chosen].tolist())
    return Data(
        train=stream,
        evaluation=held_out.batches,
        labelled=held_out.labelled,
        summary=summary,
        evaluation_summary=replace(held_out.summary, shared_with_training=shared),
        fingerprint=fingerprint,
    )


def load_evaluation(config: DataConfig, tokenizer: Tokenizer) -> EvaluationData:
    """Reads all rows of ``config.data`` to evaluate on (hub split "validation" by default).

    Raises:
        FabricError: as :func:`load_data`.
    """
    part = _read_part(config.data, "validation", config, tokenizer)
    fingerprint = _fingerprint(config, tokenizer, part.rows, 1)
    return _evaluation(part, _batch_shape(config, tokenizer, 1), config, tokenizer, fingerprint)


def read_rows(source: str, config: DataConfig, *, split: str) -> Iterator[Row]:
    """The rows of a source under the configured column names, one at a time."""
    columns = parse_columns(config.columns)
    for record in read_records(source, split=split):
        yield parse_row(rename(record.values, columns, record.where), record.where)


def _parts(config: DataConfig, tokenizer: Tokenizer) -> tuple[_Part, _Part | None]:
    """Training rows, and evaluation rows where they are asked for."""
    train = _read_part(config.data, "train", config, tokenizer)
    if config.eval_data:
        return train, _read_part(config.eval_data, "validation", config, tokenizer)
    if not config.eval_fraction:
        return train, None
    kept, aside = split_rows(
        train.rows.keys, train.rows.labels, config.eval_fraction, config.data_seed
    )
    source = f"{config.data} ({config.eval_fraction:g} set aside)"
    return replace(train, chosen=kept), replace(train, chosen=aside, source=source)


def _read_part(source: str, split: str, config: DataConfig, tokenizer: Tokenizer) -> _Part:
    """All rows of a source."""
    if not source:
        raise FabricError("no data given", fix="Name a file, folder or hub data set with --data")
    rows = tokenize_rows(read_rows(source, config, split=split), tokenizer, config.train_on)
    return _Part(rows=rows, chosen=np.arange(len(rows.documents)), source=source)


def _batch_shape(config: DataConfig, tokenizer: Tokenizer, accumulation: int) -> BatchShape:
    return BatchShape(
        max_length=config.max_length,
        batch_size=config.batch_size,
        accumulation=accumulation,
        packing=config.packing,
        pad_id=tokenizer.pad_id or 0,
    )


def _evaluation(
    part: _Part, shape: BatchShape, config: DataConfig, tokenizer: Tokenizer, fingerprint: str
) -> EvaluationData:
    """Batches [B, T] and labelled rows of a part, in its order."""
    fitted = _fit(part, config, "evaluate")
    batches = BatchStream(
        fitted.documents, replace(shape, accumulation=None), seed=None, fingerprint=fingerprint
    )
    questions = (part.rows.questions[i] for i in part.chosen.tolist())
    return EvaluationData(
        batches=batches,
        labelled=tuple(q.tokenize(tokenizer) for q in questions if q is not None),
        summary=_summarise(part, fitted, batches, config, tokenizer),
    )


def _fit(part: _Part, config: DataConfig, purpose: Literal["train", "evaluate"]) -> Fitted:
    """Documents that fit a row; that there are none is an error which says why."""
    documents = part.rows.documents.take(part.chosen)
    fitted = fit_documents(documents, config.max_length, config.long_rows)
    if fitted.kept:
        return fitted
    reasons = ", ".join(f"{n} {reason}" for reason, n in fitted.dropped.items())
    if any("position" in reason for reason in fitted.dropped):
        fix = "Raise max_length, or split long rows"
    elif config.train_on == "all":
        fix = "Give rows with text"
    else:
        fix = f"train_on is {config.train_on!r}: give rows with answers, or train on all"
    raise FabricError(
        f"no trainable token in {part.source}, nothing to {purpose} on",
        found=f"{len(documents)} rows, of which {reasons}",
        fix=fix,
    )


def _summarise(
    part: _Part, fitted: Fitted, stream: BatchStream, config: DataConfig, tokenizer: Tokenizer
) -> DataSummary:
    """Counts what became of the rows of a part."""
    documents, rows = fitted.documents, stream.rows_in_epoch(0)
    lengths = part.rows.documents.lengths[part.chosen]
    return DataSummary(
        source=part.source,
        rows_read=len(part.chosen),
        rows_kept=fitted.kept,
        rows_truncated=fitted.truncated,
        rows_split=fitted.split,
        rows_dropped=fitted.dropped,
        kinds=dict(Counter(part.rows.kinds[i] for i in part.chosen.tolist())),
        documents=len(documents),
        packed_rows=rows,
        text_tokens=int(part.rows.text_tokens[part.chosen].sum()),
        tokens=len(documents.tokens),
        trainable_tokens=int(documents.trainable_targets.sum()),
        padding_share=1 - int(documents.positions.sum()) / (rows * config.max_length),
        longest_row=int(lengths.max()),
        chat_template=part.rows.template,
        tokenizer=tokenizer.source,
    )


def _fingerprint(
    config: DataConfig, tokenizer: Tokenizer, rows: TokenizedRows, accumulation: int
) -> str:
    """Digest of what the batches depend on; where files lie and evaluation data do not count."""
    settings = asdict(config)
    for name in ("data", "eval_data", "tokenizer", "chat_template", "columns"):
        del settings[name]
    value = [rows.digest, tokenizer.fingerprint, tokenizer.chat_template, accumulation, settings]
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
