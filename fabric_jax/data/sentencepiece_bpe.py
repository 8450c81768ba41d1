"""SentencePiece BPE vocabularies (Llama 2, Gemma) as a fast tokenizer."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING

from fabric_jax.errors import FabricError

if TYPE_CHECKING:
    import tokenizers

SPACE = "\u2581"


class PieceType(IntEnum):
    """Kinds of vocabulary entries; GGUF uses SentencePiece's numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """A SentencePiece vocabulary: piece i has id i.

    Attributes:
        tokens: spellings, a space written as U+2581.
        scores: the higher, the earlier two neighbours are merged into this piece.
        types: values of PieceType.
        add_prefix_space: whether text is encoded as if a space preceded it.
    """

    tokens: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    add_prefix_space: bool


def build_sentencepiece_bpe(pieces: Pieces, source: Path) -> "tokenizers.Tokenizer":
    """A fast tokenizer that gives SentencePiece's ids, unknown characters as byte pieces.

    Raises:
        FabricError: the lists disagree in length or there is no unknown piece.
    """
    import tokenizers
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

    if not len(pieces.tokens) == len(pieces.scores) == len(pieces.types):
        raise FabricError(
            f"vocabulary of {source} is inconsistent",
            expected=f"{len(pieces.tokens)} scores and types",
            found=f"{len(pieces.scores)} scores and {len(pieces.types)} types",
        )
    kinds = list(zip(pieces.tokens, pieces.types, strict=True))
    unknown = [t for t, kind in kinds if kind == PieceType.UNKNOWN]
    if not unknown:
        raise FabricError(f"vocabulary of {source} has no unknown piece")
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(pieces.tokens)},
            merges=merges_from_scores(pieces),
            unk_token=unknown[0],
            fuse_unk=True,
            byte_fallback=PieceType.BYTE in pieces.types,
        )
    )
    # SentencePiece adds the space whatever the text starts with, so this isn't Metaspace, which
    # leaves it out before a space.
    spaces = normalizers.Replace(" ", SPACE)
    prefix = [normalizers.Prepend(SPACE)] if pieces.add_prefix_space else []
    backend.normalizer = normalizers.Sequence([*prefix, spaces])
    words = re.compile(f"[^{SPACE}]{SPACE}")
    if not any(words.search(token) for token in pieces.tokens):
        # No piece goes on past a word, so words can be merged one by one, and looked up again.
        words_split = Regex(f"{SPACE}*[^{SPACE}]+|{SPACE}+")
        backend.pre_tokenizer = pre_tokenizers.Split(words_split, behavior="isolated")
    strip = [decoders.Strip(" ", 1, 0)] if pieces.add_prefix_space else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    user_defined = [t for t, kind in kinds if kind == PieceType.USER_DEFINED]
    control = [t for t, kind in kinds if kind in (PieceType.CONTROL, PieceType.UNKNOWN)]
    # Runs of spaces are spelled with U+2581 and so can only be found in normalised text.
    backend.add_tokens([AddedToken(t, normalized=SPACE in t) for t in user_defined])
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in control])
    return backend


def merges_from_scores(pieces: Pieces) -> list[tuple[str, str]]:
    """Merge rules, first to last, that the scores imply.

    SentencePiece merges, over and over, the neighbours whose union is the piece of the highest
    score; each way to cut a piece in two pieces is therefore a rule of that piece's rank.
    """
    scores = {
        token: (-score, i)
        for i, (token, score, kind) in enumerate(
            zip(pieces.tokens, pieces.scores, pieces.types, strict=True)
        )
        if kind in (PieceType.NORMAL, PieceType.UNUSED)
    }
    ranked = [
        (rank, token[:cut], token[cut:])
        for token, rank in scores.items()
        for cut in range(1, len(token))
        if token[:cut] in scores and token[cut:] in scores
    ]
    ranked.sort(key=lambda rule: (rule[0], scores[rule[1]][1], scores[rule[2]][1]))
    return [(left, right) for _, left, right in ranked]
