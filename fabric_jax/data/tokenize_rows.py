"""From rows to tokens: which text a row becomes, and which of its tokens are trained on."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fabric_jax.data.chat import ChatTemplate, Span
from fabric_jax.data.chat_spans import assistant_spans, tokens_in_spans
from fabric_jax.data.config import TrainOn
from fabric_jax.data.documents import Documents, join_documents
from fabric_jax.data.rows import Row
from fabric_jax.data.tokenizer import Encoded, Tokenizer
from fabric_jax.errors import FabricError

# Enough rows a call to keep the tokenizer's threads busy, few enough to keep their text small.
_CHUNK = 2048


@dataclass(frozen=True, kw_only=True)
class LabelledRow:
    """A question with a known class, to be answered by the model.

    Attributes:
        prompt: text up to where the answer starts, special tokens spelled out.
        prompt_ids: the tokens of it, with begin-of-text where documents start with it.
        separator: white space between the prompt and an answer.
        label: the right answer's class.
    """

    prompt: str
    prompt_ids: tuple[int, ...]
    separator: str
    label: str


class Question(NamedTuple):
    """What a ``LabelledRow`` is made of; most rows are trained on and never asked."""

    prompt: str
    is_chat: bool
    separator: str
    label: str

    def tokenize(self, tokenizer: Tokenizer) -> LabelledRow:
        """The question with its tokens; a chat template has written special tokens itself."""
        ids = tokenizer.encode(self.prompt, add_special=not self.is_chat)
        return LabelledRow(
            prompt=self.prompt, prompt_ids=tuple(ids), separator=self.separator, label=self.label
        )


@dataclass(frozen=True, kw_only=True)
class TokenizedRows:
    """All rows of a source, row i being document i.

    Attributes:
        documents: their tokens, at full length.
        text_tokens: tokens of the text alone, int64 [rows]: no begin- or end-of-text token counted.
        keys: a hash of each row's content, uint64 [rows]; equal rows have equal keys.
        labels: their classes, None where a row has none.
        questions: what evaluation asks, None where a row has no label or no answer.
        kinds: what kind each row is of.
        template: where the chat template came from, None where no row needed one.
        digest: hex digest of all rows.
    """

    documents: Documents
    text_tokens: NDArray[np.int64]
    keys: NDArray[np.uint64]
    labels: list[str | None]
    questions: list[Question | None]
    kinds: list[str]
    template: str | None
    digest: str


class _Text(NamedTuple):
    """The text of a row; ``spans`` None trains on all of it."""

    text: str
    spans: tuple[Span, ...] | None
    is_chat: bool
    answer_start: int | None


def tokenize_rows(rows: Iterable[Row], tokenizer: Tokenizer, train_on: TrainOn) -> TokenizedRows:
    """Tokenises rows, each whole, so that no token boundary depends on what is trained on.

    Text, completions and answers get a begin-of-text token where the tokenizer adds one, and an
    end-of-text token; conversations hold what their template writes and nothing else.

    Raises:
        FabricError: a row and ``train_on`` don't go together, or a template fails on a row.
    """
    template: ChatTemplate | None = None
    tokens: list[NDArray[np.int32]] = []
    trainable: list[NDArray[np.bool_]] = []
    text_tokens: list[int] = []
    keys: list[int] = []
    labels: list[str | None] = []
    questions: list[Question | None] = []
    kinds: list[str] = []
    digest = hashlib.sha256()
    for chunk in _chunks(rows):
        if template is None and any(row.kind == "messages" for row in chunk):
            template = ChatTemplate(tokenizer)
        texts = [_text_of(row, template, train_on) for row in chunk]
        for row, text, encoded in zip(chunk, texts, _encode(tokenizer, texts), strict=True):
            ids, mask = _document(text, encoded, tokenizer)
            tokens.append(ids)
            trainable.append(mask)
            text_tokens.append(len(encoded.ids))
            content = hashlib.sha256(_content(row)).digest()
            digest.update(content)
            keys.append(int.from_bytes(content[:8], "little"))
            labels.append(row.label)
            questions.append(_question(row, text))
            kinds.append(row.kind)
    return TokenizedRows(
        documents=join_documents(tokens, trainable),
        text_tokens=np.asarray(text_tokens, np.int64),
        keys=np.asarray(keys, np.uint64),
        labels=labels,
        questions=questions,
        kinds=kinds,
        template=template.origin if template else None,
        digest=digest.hexdigest(),
    )


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk


def _content(row: Row) -> bytes:
    value = (row.text, row.answer_start, row.messages, row.tools, row.label)
    return json.dumps(value, sort_keys=True, default=str).encode()


def _text_of(row: Row, template: ChatTemplate | None, train_on: TrainOn) -> _Text:
    """The text of a row and the spans of it to train on."""
    if row.kind == "messages" and template is not None:
        return _chat_text(row, template, train_on)
    if train_on == "assistant":
        raise FabricError(
            f"{row.where}: a {row.kind} row has no assistant turns",
            fix="Train on completion or all, or give conversations as messages",
        )
    text, start = row.text, row.answer_start
    plain = row.kind in ("text", "labelled text")
    if train_on == "all" or (train_on == "auto" and plain):
        return _Text(text, None, False, start)
    if start is None:
        raise FabricError(
            f"{row.where}: this text has no completion to train on",
            expected='a line that starts with "A:", or prompt and completion',
            fix="Train on all, or correct the row",
        )
    return _Text(text, ((start, len(text)),), False, start)


def _chat_text(row: Row, template: ChatTemplate, train_on: TrainOn) -> _Text:
    """A rendered conversation; one with a label is asked for its last assistant turn."""
    try:
        if train_on == "all" and row.label is None:
            return _Text(template.render(row.messages, tools=row.tools).text, None, True, None)
        rendered = assistant_spans(template, row.messages, tools=row.tools)
    except FabricError as error:
        raise FabricError(f"{row.where}: {error}") from error
    spans = rendered.spans
    answer_start = spans[-1][0] if spans else None
    if train_on == "all":
        return _Text(rendered.text, None, True, answer_start)
    return _Text(
        rendered.text, spans[-1:] if train_on == "completion" else spans, True, answer_start
    )


def _encode(tokenizer: Tokenizer, texts: Sequence[_Text]) -> list[Encoded]:
    """Token ids, and offsets where spans need them: without them encoding is twice as fast."""
    plain = [text.text for text in texts]
    if any(text.spans is not None for text in texts):
        return tokenizer.encode_batch_with_offsets(plain)
    return [Encoded(ids, np.zeros((0, 2), np.int64)) for ids in tokenizer.encode_batch(plain)]


def _document(
    text: _Text, encoded: Encoded, tokenizer: Tokenizer
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """The document of a row: token ids and which of them are trained on."""
    ids = encoded.ids
    if text.spans is None:
        mask = np.ones(len(ids), np.bool_)
    else:
        mask = tokens_in_spans(encoded.offsets, text.spans)
    if text.is_chat or not len(ids):
        return ids, mask
    before = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    after = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return (
        np.concatenate([before, ids, after]).astype(np.int32),
        np.concatenate([[False] * len(before), mask, [True] * len(after)]).astype(np.bool_),
    )


def _question(row: Row, text: _Text) -> Question | None:
    if row.label is None or text.answer_start is None:
        return None
    answer = text.text[text.answer_start :]
    return Question(
        prompt=text.text[: text.answer_start],
        is_chat=text.is_chat,
        separator=answer[: len(answer) - len(answer.lstrip())],
        label=row.label,
    )
