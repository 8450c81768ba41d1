"""A model's tokenizer into a folder, as Hugging Face's libraries look for it."""

import shutil
from pathlib import Path
from typing import Any

from fabric_jax.checkpoints.hub import TOKENIZER_FILES
from fabric_jax.data.tokenizer import Tokenizer, load_tokenizer
from fabric_jax.files import write_atomically, write_json

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
GENERATION = "generation_config.json"


def copy_tokenizer(source: str, folder: Path) -> Tokenizer | None:
    """Copies the files of a tokenizer as they are, or writes those that its source has not.

    Args:
        source: as ``load_tokenizer`` takes it: a folder, a file of one, a hub id, a ``.gguf`` file;
            "" for a model that has none.
        folder: where; it exists.

    Returns:
        The tokenizer, None for "".

    Raises:
        FabricError: the source can't be read.
        OSError: the folder can't be written.
    """
    if not source:
        return None
    tokenizer = load_tokenizer(source)
    origin = _files_of(source)
    if origin is not None:
        beside = origin if origin.is_dir() else origin.parent
        for name in TOKENIZER_FILES:
            if (beside / name).is_file():
                shutil.copyfile(beside / name, folder / name)
        if origin.is_file() and origin.suffix == ".json":
            shutil.copyfile(origin, folder / TOKENIZER)
    if not (folder / TOKENIZER).is_file() and not (folder / "tokenizer.model").is_file():
        write_atomically(folder / TOKENIZER, tokenizer_json(tokenizer))
    for name, settings in tokenizer_settings(tokenizer).items():
        if not (folder / name).is_file():
            write_json(folder / name, settings)
    return tokenizer


def tokenizer_settings(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """What goes with a vocabulary, by file name: special tokens, chat template."""
    return {SETTINGS: _settings(tokenizer), GENERATION: special_tokens(tokenizer)}


def special_tokens(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Ids of special tokens under the names of transformers' configurations."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    stops = list(tokenizer.stop_ids)
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stops if len(stops) > 1 else tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """The vocabulary as ``tokenizer.json``; documents start with the token that they should."""
    import tokenizers
    from tokenizers.processors import TemplateProcessing

    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    bos = tokenizer.bos_id
    if tokenizer.add_bos and bos is not None and backend.encode("a").ids[:1] != [bos]:
        text = tokenizer.token_text(bos)
        pair = f"{text} $A {text} $B:1"
        backend.post_processor = TemplateProcessing(
            single=f"{text} $A", pair=pair, special_tokens=[(text, bos)]
        )
    return backend.to_str().encode()


def _settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """``tokenizer_config.json``."""
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer.add_bos,
        "clean_up_tokenization_spaces": False,
    }
    for name in ("bos", "eos", "pad"):
        number = getattr(tokenizer, f"{name}_id")
        if number is not None:
            settings[f"{name}_token"] = tokenizer.token_text(number)
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    return settings


def _files_of(source: str) -> Path | None:
    """The file or folder that a source is or was downloaded to; None for a ``.gguf`` file."""
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        return None
    if path.exists():
        return path
    from fabric_jax.data.tokenizer_folder import download_tokenizer

    return download_tokenizer(source)
