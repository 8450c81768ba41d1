"""The vocabulary of a GGUF file as a tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fabric_jax.data.byte_alphabet import byte_alphabet
from fabric_jax.data.sentencepiece_bpe import Pieces, PieceType, build_sentencepiece_bpe
from fabric_jax.errors import FabricError, unknown_name
from fabric_jax.gguf_container import Value, read_gguf

if TYPE_CHECKING:
    import tokenizers

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The split of text into words before any merge, by llama.cpp's name; None is GPT-2's own.
PRE_TOKENIZERS: dict[str, str | None] = {
    "gpt-2": None,
    "llama-bpe": _LLAMA3_SPLIT,
    "llama3": _LLAMA3_SPLIT,
    "llama-v3": _LLAMA3_SPLIT,
    "falcon3": _LLAMA3_SPLIT,
    "falcon-h1": _LLAMA3_SPLIT,
    "qwen2": _LLAMA3_SPLIT.replace("{1,3}", ""),
}


MAX_TOKEN = 1024
"""Characters of the longest token: rules are looked for at each place where it can be cut."""


@dataclass(frozen=True, kw_only=True)
class GgufVocabulary:
    """What a file says about its tokens; the attributes are those of ``Tokenizer``."""

    backend: "tokenizers.Tokenizer"
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    stop_ids: tuple[int, ...]
    add_bos: bool
    chat_template: str | None


def read_gguf_vocabulary(path: Path) -> GgufVocabulary:
    """Reads the vocabulary of a GGUF file.

    Raises:
        FabricError: not a GGUF file, no vocabulary, or a kind of vocabulary not supported.
    """
    return build_gguf_vocabulary(read_gguf(path).metadata, str(path))


def build_gguf_vocabulary(metadata: Mapping[str, Value], source: str) -> GgufVocabulary:
    """The vocabulary in metadata: models "llama" (SentencePiece) and "gpt2" (byte-level BPE).

    Args:
        metadata: of a GGUF file.
        source: its name, for messages.

    Raises:
        FabricError: no vocabulary, a kind that is not supported, or one that is inconsistent.
    """
    fields: dict[str, Any] = {
        key.removeprefix("tokenizer.").removeprefix("ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.")
    }
    kind = fields.get("model")
    if kind is None or kind in ("none", "no_vocab") or "tokens" not in fields:
        raise FabricError(
            f"{source} holds no vocabulary", fix="Name another tokenizer with --tokenizer"
        )
    builders = {"llama": _sentencepiece, "gpt2": _byte_level_bpe}
    if not isinstance(kind, str) or kind not in builders:
        raise unknown_name(f"vocabulary kind in {source}", str(kind)[:60], builders)
    _require_types(fields, source)
    try:
        backend = builders[kind](fields, source)
    except FabricError:
        raise
    except Exception as error:  # the library raises bare Exception for every fault
        raise FabricError(
            f"the vocabulary of {source} is inconsistent: {str(error)[:300]}"
        ) from error
    bos, eos, eot, eom, pad = (
        _token_id(fields, f"{name}_token_id", source)
        for name in ("bos", "eos", "eot", "eom", "padding")
    )
    # llama.cpp adds BOS to these two unless the file says otherwise.
    default_add_bos = kind == "llama" or PRE_TOKENIZERS.get(_pre(fields, source)) == _LLAMA3_SPLIT
    template = fields.get("chat_template")
    return GgufVocabulary(
        backend=backend,
        vocab_size=len(fields["tokens"]),
        bos_id=bos,
        eos_id=eos,
        pad_id=pad,
        stop_ids=tuple(sorted({i for i in (eos, eot, eom) if i is not None})),
        add_bos=bos is not None and bool(fields.get("add_bos_token", default_add_bos)),
        chat_template=template if isinstance(template, str) else None,
    )


def _require_types(fields: Mapping[str, Any], source: str) -> None:
    """Refuses lists whose elements are of the wrong kind."""
    kinds = {"tokens": str, "scores": float, "token_type": int, "merges": str}
    for key, kind in kinds.items():
        values: Any = fields.get(key, [])
        if not isinstance(values, list) or any(
            type(value) is not kind for value in cast(list[object], values)
        ):
            raise FabricError(f"tokenizer.ggml.{key} in {source} is no list of {kind.__name__}")
    longest = max(map(len, fields["tokens"]), default=0)
    if longest > MAX_TOKEN:
        raise FabricError(f"{source} has a token of {longest} characters")


def _token_id(fields: Mapping[str, Any], key: str, source: str) -> int | None:
    value = fields.get(key)
    # Vocabularies without such a token have the largest number here.
    if value is None or value in (-1, 0xFFFFFFFF):
        return None
    if type(value) is not int or not 0 <= value < len(fields["tokens"]):
        raise FabricError(
            f"tokenizer.ggml.{key} in {source} is out of range",
            expected=f"below {len(fields['tokens'])}",
            found=str(value)[:40],
        )
    return value


def _sentencepiece(fields: Mapping[str, Any], source: str) -> "tokenizers.Tokenizer":
    tokens: list[str] = fields["tokens"]
    pieces = Pieces(
        tokens=tokens,
        scores=fields.get("scores", []),
        types=fields.get("token_type", []),
        add_prefix_space=fields.get("add_space_prefix", True),
    )
    return build_sentencepiece_bpe(pieces, Path(source))


def _pre(fields: Mapping[str, Any], source: str) -> str:
    """The name of the split; vocabularies older than the key are known by their tokens."""
    if fields["model"] != "gpt2":
        return "default"
    name = fields.get("pre", "default")
    if name == "default" and "<|begin_of_text|>" in fields["tokens"]:
        return "llama-bpe"
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise unknown_name(f"tokenizer.ggml.pre in {source}", str(name)[:60], PRE_TOKENIZERS)
    return name


def _byte_level_bpe(fields: Mapping[str, Any], source: str) -> "tokenizers.Tokenizer":
    import tokenizers
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

    if "merges" not in fields:
        raise FabricError(f"{source} has a gpt2 vocabulary without tokenizer.ggml.merges")
    name = _pre(fields, source)
    split = PRE_TOKENIZERS[name]
    tokens: list[str] = fields["tokens"]
    merges = [_merge(rule, source) for rule in fields["merges"]]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            # Llama 3's vocabulary holds words that its merges don't reach.
            ignore_merges=split == _LLAMA3_SPLIT,
        )
    )
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    if split is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    backend.decoder = decoders.ByteLevel()
    types = list(zip(tokens, fields.get("token_type", []), strict=False))
    user_defined = [t for t, kind in types if kind == PieceType.USER_DEFINED]
    control = [t for t, kind in types if kind == PieceType.CONTROL]
    backend.add_tokens([AddedToken(t, normalized=False) for t in user_defined])
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in control])
    missing = set(byte_alphabet().values()) - set(tokens)
    if missing:
        raise FabricError(f"{source}: vocabulary lacks {len(missing)} of the 256 bytes")
    return backend


def _merge(rule: str, source: str) -> tuple[str, str]:
    left, _, right = rule.partition(" ")
    if not left or not right:
        raise FabricError(f"{source} has a malformed merge {rule[:60]!r}", expected="two tokens")
    return left, right
