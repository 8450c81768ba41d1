"""A tokenizer as metadata of a GGUF file."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from fabric_jax.data.gguf_vocabulary import PRE_TOKENIZERS, build_gguf_vocabulary
from fabric_jax.data.sentencepiece_bpe import SPACE, PieceType
from fabric_jax.data.tokenizer import Tokenizer, load_tokenizer
from fabric_jax.errors import FabricError
from fabric_jax.gguf_container import STRING, Field, Value, read_gguf

PREFIX = "tokenizer.ggml."
UINT32, INT32, FLOAT32, BOOL, ARRAY = 4, 5, 6, 7, 9
UNREACHABLE = -1e9
"""Score of pieces that no merge makes."""

PROBE = (
    "Q: Does drug 12345 inhibit CYP3A4?\nA: Yes. It's what they'll say.",
    "  two leading spaces,   three inside\n\n\ttabs and trailing ",
    "naïve café, 東京, עברית, 🙂👍🏽 ½ ²",
    "def f(x):\n    return x**2  # 100%",
    "DON'T we'Ve I'M 1234567 THE the\r\n\r\n",
)
"""Texts that a written vocabulary must encode as its source does."""


def tokenizer_fields(source: str, vocab_size: int) -> dict[str, Field]:
    """The fields under ``tokenizer.`` for a model of ``vocab_size`` rows.

    Args:
        source: as ``load_tokenizer`` takes it; "" for a model of bytes or of no tokens, which GGUF
            has no vocabulary for.
        vocab_size: tokens that are missing are filled in as unused ones.

    Raises:
        FabricError: the tokenizer has more tokens, or is of a kind that llama.cpp has not.
    """
    if not source:
        return {f"{PREFIX}model": _text("no_vocab")}
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        fields = {k: v for k, v in read_gguf(path).fields.items() if k.startswith("tokenizer.")}
    else:
        tokenizer = load_tokenizer(source)
        fields = _vocabulary(tokenizer) | _settings(tokenizer)
        _require_same(tokenizer, fields)
    return fields | _filled(fields, vocab_size, source)


def _vocabulary(tokenizer: Tokenizer) -> dict[str, Field]:
    stored: dict[str, Any] = json.loads(tokenizer.backend.to_str())
    model: dict[str, Any] = stored["model"]
    if model.get("type") != "BPE":
        raise FabricError(
            f"the tokenizer {tokenizer.source} can't be written to GGUF",
            expected="a BPE vocabulary",
            found=str(model.get("type")),
        )
    added: list[dict[str, Any]] = stored["added_tokens"]
    tokens = dict(cast(dict[str, int], model["vocab"])) | {t["content"]: t["id"] for t in added}
    names = [f"[PAD{i}]" for i in range(max(tokens.values()) + 1)]
    types = [PieceType.UNUSED.value] * len(names)
    sentencepiece = bool(model.get("byte_fallback")) or _mentions(stored, SPACE)
    for token, number in tokens.items():
        names[number] = token
        is_byte = sentencepiece and re.fullmatch(r"<0x[0-9A-F]{2}>", token)
        types[number] = PieceType.BYTE.value if is_byte else PieceType.NORMAL.value
    for token in added:
        kind = PieceType.CONTROL if token["special"] else PieceType.USER_DEFINED
        types[token["id"]] = kind.value
    merges = [rule if isinstance(rule, str) else " ".join(rule) for rule in model["merges"]]
    pairs = [cast(tuple[str, str], tuple(rule.split(" ", 1))) for rule in merges]
    if sentencepiece:
        unknown = model.get("unk_token")
        if unknown in tokens:
            types[tokens[unknown]] = PieceType.UNKNOWN.value
        own = {"scores": _list(FLOAT32, _scores(names, types, pairs))}
        own |= {"add_space_prefix": _flag(_adds_space(stored))}
        kind = "llama"
    else:
        own = {"merges": _list(STRING, merges), "pre": _text(_split_name(stored, tokenizer.source))}
        kind = "gpt2"
    common = {
        "model": _text(kind),
        "tokens": _list(STRING, names),
        "token_type": _list(INT32, types),
    }
    return {PREFIX + key: field for key, field in (common | own).items()}


def _settings(tokenizer: Tokenizer) -> dict[str, Field]:
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    turn_ends = [i for i in tokenizer.stop_ids if i != tokenizer.eos_id]
    if turn_ends:
        ids["eot"] = turn_ends[0]
    fields = {
        f"{PREFIX}{name}_token_id": Field(type=UINT32, element_type=None, value=number)
        for name, number in ids.items()
        if number is not None
    }
    fields[f"{PREFIX}add_bos_token"] = _flag(tokenizer.add_bos)
    if tokenizer.chat_template:
        fields["tokenizer.chat_template"] = _text(tokenizer.chat_template)
    return fields


def _scores(names: list[str], types: list[int], merges: list[tuple[str, str]]) -> list[float]:
    """SentencePiece merges the neighbours whose union scores highest: the earliest rule's."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    normal = PieceType.NORMAL.value
    return [
        (-float(ranks[name]) if name in ranks else UNREACHABLE) if kind == normal else 0.0
        for name, kind in zip(names, types, strict=True)
    ]


def _adds_space(stored: Mapping[str, Any]) -> bool:
    """Whether text is encoded as if a space preceded it."""
    normalizers = _flat(stored.get("normalizer"), "normalizers")
    splits = _flat(stored.get("pre_tokenizer"), "pretokenizers")
    return any(part.get("type") == "Prepend" for part in normalizers) or any(
        part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never"
        for part in splits
    )


def _split_name(stored: Mapping[str, Any], source: str) -> str:
    """llama.cpp's name of the split of text into words."""
    splits = _flat(stored.get("pre_tokenizer"), "pretokenizers")
    patterns = [
        part.get("pattern", {}).get("Regex") for part in splits if part.get("type") == "Split"
    ]
    whole_words = [part for part in splits if part.get("type") == "ByteLevel"]
    if not patterns and whole_words and whole_words[0].get("use_regex", True):
        patterns = [None]
    known = {pattern: name for name, pattern in reversed(PRE_TOKENIZERS.items())}
    if len(patterns) != 1 or patterns[0] not in known or not whole_words:
        raise FabricError(
            f"the tokenizer {source} splits words in a way that has no name in GGUF",
            expected=f"that of {', '.join(PRE_TOKENIZERS)}",
            found=str(patterns)[:200],
            fix="Copy the vocabulary from a .gguf file of the model, by naming it as tokenizer",
        )
    return known[patterns[0]]


def _require_same(tokenizer: Tokenizer, fields: Mapping[str, Field]) -> None:
    """Refuses a vocabulary that does not give its source's ids, as far as the probe shows."""
    values: dict[str, Value] = {key: field.value for key, field in fields.items()}
    written = build_gguf_vocabulary(values, tokenizer.source).backend
    specials = "".join(tokenizer.token_text(i) for i in sorted(tokenizer.special_ids)[:8])
    stored = json.loads(tokenizer.backend.to_str())
    splits = _flat(stored.get("pre_tokenizer"), "pretokenizers")
    # SentencePiece and llama.cpp put a space before a text whatever it starts with, transformers'
    # copy of the rule not before another space: there the file is right and its source is not.
    metaspace = any(part.get("type") == "Metaspace" for part in splits)
    for text in (*PROBE, specials):
        if metaspace and text.startswith(" "):
            continue
        ids = written.encode(text, add_special_tokens=False).ids
        if ids != tokenizer.encode(text):
            raise FabricError(
                f"the tokenizer {tokenizer.source} has rules that GGUF can't hold",
                expected=f"the ids {tokenizer.encode(text)[:12]} for {text[:30]!r}",
                found=str(ids[:12]),
            )


def _filled(fields: Mapping[str, Field], vocab_size: int, source: str) -> dict[str, Field]:
    """The lists that have one element a token, as long as the model's embedding."""
    tokens = fields.get(f"{PREFIX}tokens")
    if tokens is None:
        return {}
    count = len(cast(list[str], tokens.value))
    if count > vocab_size:
        raise FabricError(
            f"the tokenizer {source} has {count} tokens, the model only {vocab_size}",
            fix="Name the model's own tokenizer",
        )
    extra = [f"[PAD{i}]" for i in range(count, vocab_size)]
    fill: dict[str, list[Any]] = {
        "tokens": extra,
        "scores": [0.0] * len(extra),
        "token_type": [PieceType.UNUSED.value] * len(extra),
    }
    out: dict[str, Field] = {}
    for key, values in fill.items():
        field = fields.get(PREFIX + key)
        if field is not None and isinstance(field.value, list):
            longer = [*field.value, *values]
            out[PREFIX + key] = Field(type=ARRAY, element_type=field.element_type, value=longer)
    return out


def _flat(part: Any, key: str) -> list[dict[str, Any]]:
    """A rule of a tokenizer.json, or the rules of a sequence of them."""
    if not isinstance(part, dict):
        return []
    rule = cast(dict[str, Any], part)
    return list(rule.get(key, [rule]))


def _mentions(stored: Mapping[str, Any], text: str) -> bool:
    rules = {key: stored.get(key) for key in ("normalizer", "pre_tokenizer")}
    return text in json.dumps(rules, ensure_ascii=False)


def _text(value: str) -> Field:
    return Field(type=STRING, element_type=None, value=value)


def _flag(value: bool) -> Field:
    return Field(type=BOOL, element_type=None, value=value)


def _list(kind: int, values: list[Any]) -> Field:
    return Field(type=ARRAY, element_type=kind, value=values)
