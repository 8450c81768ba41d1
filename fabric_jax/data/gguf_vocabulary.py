"""The vocabulary of a GGUF file as a tokenizer."""

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fabric_jax.data.sentencepiece_bpe import Pieces, PieceType, build_sentencepiece_bpe
from fabric_jax.data.tokenizer import Tokenizer, byte_alphabet
from fabric_jax.errors import FabricError, unknown_name

if TYPE_CHECKING:
    import gguf
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


def load_gguf(path: Path) -> Tokenizer:
    """Loads the vocabulary of ``path``: models "llama" (SentencePiece) and "gpt2" (byte-level BPE).

    Raises:
        FabricError: not a GGUF file, no vocabulary, or a kind of vocabulary not supported.
    """
    fields = _read_fields(path)
    kind = fields.get("model")
    if kind is None or kind == "none" or "tokens" not in fields:
        raise FabricError(
            f"{path} holds no vocabulary", fix="Name another tokenizer with --tokenizer"
        )
    if kind == "llama":
        backend = _sentencepiece(fields, path)
    elif kind == "gpt2":
        backend = _byte_level_bpe(fields, path)
    else:
        raise unknown_name(f"vocabulary kind in {path}", str(kind), ("llama", "gpt2"))
    bos, eos = fields.get("bos_token_id"), fields.get("eos_token_id")
    stops = (eos, fields.get("eot_token_id"), fields.get("eom_token_id"))
    # llama.cpp adds BOS to these two unless the file says otherwise.
    default_add_bos = kind == "llama" or PRE_TOKENIZERS.get(_pre(fields, path)) == _LLAMA3_SPLIT
    return Tokenizer(
        backend=backend,
        source=str(path),
        vocab_size=len(fields["tokens"]),
        bos_id=bos,
        eos_id=eos,
        pad_id=fields.get("padding_token_id"),
        stop_ids=tuple(sorted({i for i in stops if i is not None})),
        add_bos=bos is not None and bool(fields.get("add_bos_token", default_add_bos)),
        chat_template=fields.get("chat_template"),
    )


def _read_fields(path: Path) -> dict[str, Any]:
    """Metadata under ``tokenizer.ggml.``, the prefix left out, and the chat template."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        fields = {
            name.removeprefix("tokenizer.").removeprefix("ggml."): _contents(field)
            for name, field in reader.fields.items()
            if name.startswith("tokenizer.")
        }
    except (OSError, ValueError, KeyError, IndexError, TypeError, struct.error) as error:
        raise FabricError(
            f"cannot read {path}", expected="a GGUF file", found=str(error) or repr(error)
        ) from error
    return fields


def _contents(field: "gguf.ReaderField") -> Any:
    return cast(Any, field).contents()


def _sentencepiece(fields: dict[str, Any], path: Path) -> "tokenizers.Tokenizer":
    tokens: list[str] = fields["tokens"]
    pieces = Pieces(
        tokens=tokens,
        scores=fields.get("scores", []),
        types=fields.get("token_type", []),
        add_prefix_space=fields.get("add_space_prefix", True),
    )
    return build_sentencepiece_bpe(pieces, path)


def _pre(fields: dict[str, Any], path: Path) -> str:
    """The name of the split; vocabularies older than the key are known by their tokens."""
    if fields["model"] != "gpt2":
        return "default"
    name = fields.get("pre", "default")
    if name == "default" and "<|begin_of_text|>" in fields["tokens"]:
        return "llama-bpe"
    if name not in PRE_TOKENIZERS:
        raise unknown_name(f"tokenizer.ggml.pre in {path}", name, PRE_TOKENIZERS)
    return name


def _byte_level_bpe(fields: dict[str, Any], path: Path) -> "tokenizers.Tokenizer":
    import tokenizers
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

    if "merges" not in fields:
        raise FabricError(f"{path} has a gpt2 vocabulary without tokenizer.ggml.merges")
    name = _pre(fields, path)
    split = PRE_TOKENIZERS[name]
    tokens: list[str] = fields["tokens"]
    merges = [_merge(rule, path) for rule in fields["merges"]]
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
    missing = [char for char in byte_alphabet().values() if char not in fields["tokens"]]
    if missing:
        raise FabricError(f"{path}: vocabulary lacks {len(missing)} of the 256 bytes")
    return backend


def _merge(rule: str, path: Path) -> tuple[str, str]:
    left, _, right = rule.partition(" ")
    if not left or not right:
        raise FabricError(f"{path} has a malformed merge {rule!r}", expected="two tokens")
    return left, right
