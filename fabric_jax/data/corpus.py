"""A corpus on disk: documents tokenised once, as memory-mapped shards with a checked index.

``index.json`` says what was tokenised with what; ``<split>-<number>.bin`` hold token ids one after
another, little-endian uint16 or, for more than 65,536 tokens, uint32; ``<split>-documents.bin``
holds where each document starts, int64. The folder appears whole or not at all.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fabric_jax.checkpoints.folders import new_folder, read_json_object
from fabric_jax.data.rows import Row
from fabric_jax.data.tokenizer import Tokenizer
from fabric_jax.errors import FabricError
from fabric_jax.files import write_atomically, write_json

FORMAT, VERSION = "fabric_jax corpus", 1
INDEX, TOKENIZER = "index.json", "tokenizer.json"
SHARD_TOKENS = 1 << 27
SPLITS = ("train", "held_out")
CHUNK = 256
"""Documents that are tokenised at once, on all cores."""


@dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """What a corpus depends on beside the contents of its source.

    Attributes:
        source: of the documents.
        held_out_source: of those to evaluate on; "" for a share of ``source``.
        held_out: that share.
        seed: chooses the documents that are held out, by their contents.
        columns: what is read under other names, as ``known=column``.
        vocabulary: the size that was asked for where it was learnt from ``source``, else 0.
    """

    source: str
    held_out_source: str = ""
    held_out: float = 0.0
    seed: int = 0
    columns: tuple[str, ...] = ()
    vocabulary: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As the index holds them."""
        return vars(self) | {"columns": sorted(self.columns)}


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSplit:
    """The tokens of some documents, one after another.

    Attributes:
        shards: parts of the sequence, uint16 or uint32, memory-mapped.
        starts: where each document starts, int64 [documents].
        tokens: length of the sequence.
        text_bytes: UTF-8 bytes of the documents' text.
    """

    shards: Sequence[NDArray[Any]]
    starts: NDArray[np.int64]
    tokens: int
    text_bytes: int

    def read(self, start: int, stop: int) -> NDArray[np.int32]:
        """Token ids [start, stop) of the sequence, int32."""
        parts: list[NDArray[Any]] = []
        begin = 0
        for shard in self.shards:
            low, high = max(start - begin, 0), min(stop - begin, len(shard))
            if low < high:
                parts.append(shard[low:high])
            begin += len(shard)
        return np.concatenate(parts).astype(np.int32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """An opened corpus.

    Attributes:
        folder: where it lies.
        train: documents to train on.
        held_out: documents to evaluate on; None where there are none.
        digest: of the index, which has the digests of all files.
        content: SHA-256 of all documents' texts.
    """

    folder: Path
    train: TokenSplit
    held_out: TokenSplit | None
    digest: str
    content: str


@dataclass(kw_only=True)
class _Writer:
    """Appends documents of one split to its shards."""

    folder: Path
    split: str
    dtype: np.dtype[Any]
    starts: list[int] = field(default_factory=list[int])
    shards: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    tokens: int = 0
    text_bytes: int = 0
    _file: BinaryIO | None = None
    _digest: Any = None

    def add(self, ids: NDArray[np.int32], text_bytes: int) -> None:
        self.starts.append(self.tokens)
        self.text_bytes += text_bytes
        self.tokens += len(ids)
        while len(ids):
            if self._file is None:
                name = f"{self.split}-{len(self.shards):05d}.bin"
                self._file, self._digest = (self.folder / name).open("wb"), hashlib.sha256()
                self.shards.append({"file": name, "tokens": 0})
            shard = self.shards[-1]
            part, ids = np.split(ids, [SHARD_TOKENS - shard["tokens"]])
            data = part.astype(self.dtype).tobytes()
            self._file.write(data)
            self._digest.update(data)
            shard["tokens"] += len(part)
            if shard["tokens"] == SHARD_TOKENS:
                self._close()

    def finish(self) -> dict[str, Any]:
        """The split's part of the index."""
        self._close()
        starts = np.asarray(self.starts, "<i8").tobytes()
        name = f"{self.split}-documents.bin"
        (self.folder / name).write_bytes(starts)
        return {
            "tokens": self.tokens,
            "documents": len(self.starts),
            "text_bytes": self.text_bytes,
            "starts": {"file": name, "sha256": hashlib.sha256(starts).hexdigest()},
            "shards": self.shards,
        }

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self.shards[-1]["sha256"] = self._digest.hexdigest()
            self._file = None


def write_corpus(
    folder: str | Path,
    settings: CorpusSettings,
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    held_out_rows: Iterable[Row] = (),
) -> Corpus:
    """Tokenises documents into a new folder.

    A document is the text of a row, after a begin-of-text token where the tokenizer adds one and
    before an end-of-text token where it has one.

    Args:
        folder: where; it must not exist or be empty.
        settings: for the index; ``held_out`` of the documents are set aside.
        rows: the documents.
        tokenizer: the vocabulary; it is saved beside the tokens.
        held_out_rows: documents to evaluate on.

    Raises:
        FabricError: a row is a conversation, there are no documents, or the disk is full.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    content = hashlib.sha256()
    with new_folder(folder, replaces=frozenset()) as staged:
        writers = {split: _Writer(folder=staged, split=split, dtype=dtype) for split in SPLITS}
        for source, aside in ((rows, False), (held_out_rows, True)):
            for text, ids in _tokenised(source, tokenizer):
                data = text.encode()
                key = hashlib.sha256(data).digest()
                content.update(key)
                held = aside or _is_held_out(key, settings)
                writers["held_out" if held else "train"].add(ids, len(data))
        _check_not_empty(writers, settings)
        index = {
            "format": FORMAT,
            "version": VERSION,
            "settings": settings.to_dict(),
            "tokenizer": {"fingerprint": tokenizer.fingerprint, "size": tokenizer.vocab_size},
            "dtype": dtype.name,
            "content": content.hexdigest(),
            "splits": {split: writer.finish() for split, writer in writers.items()},
        }
        write_atomically(staged / TOKENIZER, tokenizer.backend.to_str().encode())
        write_json(staged / INDEX, index)
    return open_corpus(folder)


def open_corpus(folder: str | Path) -> Corpus:
    """Opens a corpus and checks every file of it against its digest.

    Raises:
        FabricError: the folder holds no corpus, or a file of it is missing or damaged.
    """
    folder = Path(folder)
    index = _read_index(folder)
    text = json.dumps(index, sort_keys=True).encode()
    splits = {name: _open_split(folder, index, name) for name in SPLITS}
    held_out = splits["held_out"]
    return Corpus(
        folder=folder,
        train=splits["train"],
        held_out=held_out if held_out.tokens else None,
        digest=hashlib.sha256(text).hexdigest(),
        content=index["content"],
    )


def is_corpus(folder: str | Path) -> bool:
    """Whether ``write_corpus`` made this folder."""
    return (Path(folder) / INDEX).is_file()


def check_corpus(folder: str | Path, settings: CorpusSettings, fingerprint: str) -> None:
    """Refuses a corpus made with other settings or another tokenizer.

    Raises:
        FabricError: names what differs.
    """
    index = _read_index(Path(folder))
    wanted = settings.to_dict() | {"tokenizer": fingerprint}
    if not settings.vocabulary:
        del wanted["vocabulary"]  # Its fingerprint says all about a tokenizer that is named.
    found = index["settings"] | {"tokenizer": index["tokenizer"]["fingerprint"]}
    for name, value in wanted.items():
        # Corpora from before there was such a setting don't say.
        if name in found and found[name] != value:
            one = name.replace("_", " ").removesuffix("s")
            raise FabricError(
                f"the corpus in {folder} was made with another {one}",
                expected=str(value),
                found=str(found[name]),
                fix="Choose another folder, or remove this one to have it made anew",
            )


def _read_index(folder: Path) -> dict[str, Any]:
    index = read_json_object(folder / INDEX)
    if index.get("format") != FORMAT or index.get("version") != VERSION:
        raise FabricError(
            f"{folder} holds no corpus of this version",
            expected=f"{FORMAT} {VERSION}",
            found=f"{index.get('format')} {index.get('version')}",
        )
    return index


def _open_split(folder: Path, index: dict[str, Any], name: str) -> TokenSplit:
    split, dtype = index["splits"][name], np.dtype(index["dtype"]).newbyteorder("<")
    for file in (split["starts"], *split["shards"]):
        _check_digest(folder / file["file"], file["sha256"])
    starts = np.fromfile(folder / split["starts"]["file"], "<i8")
    shards = [np.memmap(folder / shard["file"], dtype, "r") for shard in split["shards"]]
    return TokenSplit(
        shards=shards, starts=starts, tokens=split["tokens"], text_bytes=split["text_bytes"]
    )


def _check_digest(path: Path, expected: str) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FabricError(f"cannot read {path}: {error.strerror}") from error
    if found != expected:
        raise FabricError(
            f"{path} is damaged: its SHA-256 is not that of the index",
            fix="Remove the folder to have the corpus made anew",
        )


def _tokenised(
    rows: Iterable[Row], tokenizer: Tokenizer
) -> Iterator[tuple[str, NDArray[np.int32]]]:
    """Texts and their ids, special tokens included."""
    before = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    after = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    iterator = iter(rows)
    while chunk := list(islice(iterator, CHUNK)):
        for row in chunk:
            if row.messages:
                raise FabricError(
                    f"{row.where}: a conversation is no document of a corpus",
                    fix="Train on conversations with --recipe sft",
                )
        texts = [row.text for row in chunk if row.text]
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            document = np.concatenate([before, ids, after]).astype(np.int32)
            # White space alone can be no token at all; two documents never start at one place.
            if len(document):
                yield text, document


def _is_held_out(key: bytes, settings: CorpusSettings) -> bool:
    """By contents: equal documents are on one side, whatever their number and order."""
    if not settings.held_out:
        return False
    rank = hashlib.sha256(f"{settings.seed}/".encode() + key).digest()
    return int.from_bytes(rank[:8], "big") < settings.held_out * 2**64


def _check_not_empty(writers: dict[str, _Writer], settings: CorpusSettings) -> None:
    if writers["train"].tokens < 2:
        aside = len(writers["held_out"].starts) if settings.held_out else 0
        raise FabricError(
            f"no text to train on in {settings.source}",
            found=f"{aside} documents, all of them held out" if aside else None,
            fix="Lower --eval-fraction, or give more documents" if aside else None,
        )
    wanted = settings.held_out > 0 or settings.held_out_source
    if wanted and writers["held_out"].tokens < 2:
        raise FabricError(
            f"no document of {settings.source} is held out",
            found=f"{len(writers['train'].starts)} documents",
            fix="Raise --eval-fraction, or give --eval-data",
        )
