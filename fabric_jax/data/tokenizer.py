"""Text to token ids and back: one small interface over every vocabulary that can be loaded."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fabric_jax.data.byte_alphabet import byte_alphabet
from fabric_jax.errors import FabricError

if TYPE_CHECKING:
    import tokenizers


class Encoded(NamedTuple):
    """Token ids int32 [n] and, for each, its half-open span of characters, int64 [n, 2]."""

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A vocabulary with its special tokens and its chat template.

    Attributes:
        source: where it came from, for messages.
        vocab_size: one more than the largest id.
        bos_id: begin-of-text token, None where the vocabulary has none; so for the next two.
        eos_id: end-of-text token.
        pad_id: padding token.
        stop_ids: tokens that end a generated answer: end of text and end of turn.
        add_bos: whether documents start with ``bos_id``.
        chat_template: Jinja text, None where the source has none.
    """

    backend: "tokenizers.Tokenizer" = field(repr=False, compare=False)
    source: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    stop_ids: tuple[int, ...]
    add_bos: bool
    chat_template: str | None = field(repr=False)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens that mark structure rather than text."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of everything that changes ids: vocabulary, rules, special tokens."""
        digest = hashlib.sha256(self.backend.to_str().encode())
        digest.update(repr((self.bos_id, self.eos_id, self.pad_id, self.add_bos)).encode())
        return digest.hexdigest()

    def encode(self, text: str, *, add_special: bool = False) -> list[int]:
        """Ids of ``text``; with ``add_special`` after ``bos_id``, where documents start with it."""
        try:
            ids = list(self.backend.encode(text, add_special_tokens=False).ids)
        except TypeError as error:
            raise _no_text([text]) from error
        if add_special and self.add_bos and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        return ids

    def encode_with_offsets(self, text: str) -> Encoded:
        """Ids and character spans of ``text``, no special token added."""
        return self.encode_batch_with_offsets([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Ids of many texts, on all cores."""
        try:
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError as error:
            raise _no_text(texts) from error
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def encode_batch_with_offsets(self, texts: Sequence[str]) -> list[Encoded]:
        """Ids and character spans of many texts, on all cores."""
        try:
            encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        except TypeError as error:
            raise _no_text(texts) from error
        return [
            Encoded(
                np.asarray(encoding.ids, np.int32),
                np.asarray(encoding.offsets, np.int64).reshape(-1, 2),
            )
            for encoding in encodings
        ]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of ``ids``; ``skip_special`` leaves out special tokens."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def token_to_id(self, token: str) -> int | None:
        """The id of exactly this token, None where the vocabulary lacks it."""
        return self.backend.token_to_id(token)

    def token_text(self, token_id: int | None) -> str:
        """The spelling of a token as templates write it, empty for None."""
        text = None if token_id is None else self.backend.id_to_token(token_id)
        return text or ""


def _no_text(texts: Sequence[str]) -> FabricError:
    """The error for what Python takes for a text and UTF-8 doesn't."""
    wrong = next((text for text in texts if not _is_text(text)), "")
    return FabricError(
        "a text has half of a surrogate pair, which is no character",
        found=ascii(wrong)[:80],
        fix="Correct or remove it",
    )


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def byte_tokenizer() -> Tokenizer:
    """Bytes as tokens: ids 0..255 are the bytes of UTF-8, then ``<|pad|> <|bos|> <|eos|>``."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {char: byte for byte, char in byte_alphabet().items()}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|pad|>", "<|bos|>", "<|eos|>"])
    return Tokenizer(
        backend=backend,
        source="bytes",
        vocab_size=259,
        pad_id=256,
        bos_id=257,
        eos_id=258,
        stop_ids=(258,),
        add_bos=True,
        chat_template=None,
    )


def load_tokenizer(source: str | Path, *, chat_template: str | Path | None = None) -> Tokenizer:
    """Loads a vocabulary.

    Args:
        source: "" for bytes; a folder or hub id (``org/name[@revision]``) with ``tokenizer.json``
            or ``tokenizer.model``; one of these files; a ``.gguf`` file.
        chat_template: a Jinja file that replaces the template of the source.

    Raises:
        FabricError: the source is missing, unreadable or of a kind that isn't supported.
    """
    from fabric_jax.data.gguf_vocabulary import read_gguf_vocabulary
    from fabric_jax.data.tokenizer_folder import download_tokenizer, load_file, load_folder

    text = str(source)
    path = Path(text).expanduser()
    if not text:
        tokenizer = byte_tokenizer()
    elif path.is_dir():
        tokenizer = load_folder(path)
    elif path.is_file():
        if path.suffix == ".gguf":
            tokenizer = Tokenizer(source=str(path), **vars(read_gguf_vocabulary(path)))
        else:
            tokenizer = load_file(path)
    else:
        tokenizer = load_folder(download_tokenizer(text), source=text)
    if chat_template:
        tokenizer = replace(tokenizer, chat_template=read_template(Path(chat_template)))
    return tokenizer


def read_template(path: Path) -> str:
    """The text of a Jinja file.

    Raises:
        FabricError: it can't be read, or is not UTF-8.
    """
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FabricError(f"cannot read chat template {path}: {error}") from error
