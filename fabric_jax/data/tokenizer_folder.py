"""Hugging Face tokenizer folders, from disk or from the hub."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fabric_jax.checkpoints.hub import fetch_tokenizer, is_hub_id
from fabric_jax.data.sentencepiece_bpe import build_sentencepiece_bpe
from fabric_jax.data.sentencepiece_model import read_sentencepiece_model
from fabric_jax.data.tokenizer import Tokenizer, read_template
from fabric_jax.errors import FabricError

if TYPE_CHECKING:
    import tokenizers

# Spellings that published vocabularies use, looked for only where no file names the token.
_KNOWN_TOKENS = {
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>"),
    "eos_token": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    "pad_token": ("<pad>", "<|pad|>"),
}


def load_folder(folder: Path, *, source: str | None = None) -> Tokenizer:
    """Loads ``tokenizer.json``, else ``tokenizer.model``, with the settings beside it.

    Raises:
        FabricError: neither file is there, or one that is can't be read.
    """
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            return load_file(folder / name, source=source)
    vocabularies = sorted(folder.glob("*.gguf"))
    raise FabricError(
        f"no tokenizer in {source or folder}",
        expected="tokenizer.json or tokenizer.model",
        fix=f"Name {vocabularies[0]} itself" if vocabularies else None,
    )


def load_file(path: Path, *, source: str | None = None) -> Tokenizer:
    """Loads one ``tokenizer.json`` or ``tokenizer.model``; settings are read from its folder."""
    folder = path.parent
    config = _read_json(folder / "tokenizer_config.json")
    special = _read_json(folder / "special_tokens_map.json") | config
    if path.suffix == ".model":
        backend = build_sentencepiece_bpe(read_sentencepiece_model(path), path)
        _add_extra_tokens(backend, folder, config)
    else:
        backend = _load_json(path)
    ids = {name: _special_id(backend, special, name) for name in _KNOWN_TOKENS}
    bos, eos = ids["bos_token"], ids["eos_token"]
    return Tokenizer(
        backend=backend,
        source=source or str(path),
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        bos_id=bos,
        eos_id=eos,
        pad_id=ids["pad_token"],
        stop_ids=_stop_ids(folder, eos),
        add_bos=_adds_bos(backend, config, bos, path),
        chat_template=_chat_template(folder, config),
    )


def download_tokenizer(hub_id: str) -> Path:
    """The cached folder with the tokenizer files of ``org/name[@revision]``.

    Raises:
        FabricError: neither a path nor a hub id, or it can't be reached and isn't cached.
    """
    if not is_hub_id(hub_id) or hub_id.endswith((".json", ".gguf")):
        raise FabricError(
            f"no tokenizer at {hub_id}",
            expected="a folder, tokenizer.json, tokenizer.model, .gguf file or hub id org/name",
        )
    return fetch_tokenizer(hub_id)


def _load_json(path: Path) -> "tokenizers.Tokenizer":
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every fault
        raise FabricError(
            f"cannot read {path}", expected="a tokenizer.json", found=_first_line(error)
        ) from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``, empty where there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise FabricError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise FabricError(f"cannot read {path}", expected="a JSON object")
    return cast(dict[str, Any], value)


def _spelling(token: object) -> str | None:
    """Special tokens are written as strings or as objects with the string under "content"."""
    if isinstance(token, Mapping):
        token = cast(Mapping[str, object], token).get("content")
    return token if isinstance(token, str) else None


def _special_id(
    backend: "tokenizers.Tokenizer", special: Mapping[str, Any], name: str
) -> int | None:
    if name in special:
        spelling = _spelling(special[name])
        return None if spelling is None else backend.token_to_id(spelling)
    if any(key in special for key in _KNOWN_TOKENS):
        return None
    found = (backend.token_to_id(spelling) for spelling in _KNOWN_TOKENS[name])
    return next((number for number in found if number is not None), None)


def _adds_bos(
    backend: "tokenizers.Tokenizer", config: Mapping[str, Any], bos: int | None, path: Path
) -> bool:
    """Whether documents start with ``bos``: as configured, else as the post-processor does."""
    if bos is None:
        return False
    if isinstance(config.get("add_bos_token"), bool):
        return config["add_bos_token"]
    if path.suffix == ".model":
        return True
    return backend.encode("a", add_special_tokens=True).ids[:1] == [bos]


def _stop_ids(folder: Path, eos: int | None) -> tuple[int, ...]:
    """Tokens that end an answer: those the model names, and the vocabulary's end of text."""
    stops: object = None
    for name in ("generation_config.json", "config.json"):
        stops = _read_json(folder / name).get("eos_token_id") if stops is None else stops
    listed = cast(list[object], stops) if isinstance(stops, list) else [stops]
    ids = {number for number in [*listed, eos] if isinstance(number, int)}
    return tuple(sorted(ids))


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template of the folder; of several named ones, the one called "default"."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return read_template(file)
    template = _read_json(folder / "chat_template.json").get(
        "chat_template", config.get("chat_template")
    )
    if isinstance(template, list):
        named = {t["name"]: t["template"] for t in cast(list[dict[str, str]], template)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _add_extra_tokens(
    backend: "tokenizers.Tokenizer", folder: Path, config: Mapping[str, Any]
) -> None:
    """Adds tokens that Hugging Face files append to a ``tokenizer.model``, in order of id."""
    from tokenizers import AddedToken

    added = _read_json(folder / "added_tokens.json")
    wanted: dict[int, str | None] = {int(number): text for text, number in added.items()}
    listed: Mapping[str, object] = config.get("added_tokens_decoder", {})
    for number, token in listed.items():
        wanted[int(number)] = _spelling(token)
    for number, text in sorted(wanted.items()):
        if text is None or backend.token_to_id(text) is not None:
            continue
        backend.add_special_tokens([AddedToken(text, normalized=False)])
        if backend.token_to_id(text) != number:
            raise FabricError(
                f"added token {text!r} in {folder} does not follow the vocabulary",
                expected=f"id {number}",
                found=f"id {backend.token_to_id(text)}",
            )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else repr(error)
