"""Files of the Hugging Face hub, through its own library: its cache, progress bars and resuming.

A name is ``org/name``, or ``org/name/path/file.gguf`` for one file; ``@revision`` may follow.
Without a connection what the cache holds is used, and its revision is reported. Only files of the
kinds that are read here are fetched: no pickles, no code.
"""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fabric_jax.errors import FabricError, unknown_name

HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)((?:/[\w-][\w. -]*)+\.gguf)?(?:@([\w./-]+))?")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
MODEL_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES)
# In folders there are other formats and optimizer states; "consolidated" is a second copy of all
# weights in the layout of their authors.
NOT_FETCHED = ("*/*", "consolidated*")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class HubId:
    """The parts of a hub id; ``file`` is "" for the whole repository, ``revision`` for its main."""

    repository: str
    file: str
    revision: str


def is_hub_id(name: str) -> bool:
    """Whether a name can be that of a repository on the hub or of a ``.gguf`` file in one."""
    return HUB_ID.fullmatch(name) is not None and ".." not in name


def parse_hub_id(name: str) -> HubId:
    """The parts of a hub id.

    Raises:
        FabricError: it is none.
    """
    match = HUB_ID.fullmatch(name)
    if match is None or ".." in name:
        raise FabricError(f"{name} is no hub id", expected="org/name[@revision]")
    return HubId(
        repository=match[1], file=(match[2] or "").removeprefix("/"), revision=match[3] or ""
    )


def fetch_model(name: str) -> Path:
    """The cached folder of a model, or the ``.gguf`` file that ``name`` names.

    Raises:
        FabricError: there is no such repository or revision, it has no weights that can be read,
            or it can't be reached and is not in the cache.
    """
    wanted = parse_hub_id(name)

    def check(files: Sequence[str]) -> None:
        _require_weights(wanted, files)

    if not wanted.file:
        return _fetch(name, "model", MODEL_FILES, NOT_FETCHED, check)
    path = _fetch(name, "model", (wanted.file,), (), check) / wanted.file
    if not path.is_file():
        raise FabricError(
            f"cannot get model {name}: the hub can't be reached and the file is not in its cache"
        )
    return path


def fetch_tokenizer(name: str) -> Path:
    """The cached folder with the tokenizer of a repository.

    Raises:
        FabricError: it can't be reached and is not in the cache.
    """
    files = ("config.json", *TOKENIZER_FILES)
    return _fetch(name, "tokenizer", files, NOT_FETCHED, lambda files: None)


def _fetch(
    name: str,
    what: str,
    patterns: Sequence[str],
    ignored: Sequence[str],
    check: Callable[[Sequence[str]], None],
) -> Path:
    """The cached folder of a repository, with all files of it that match.

    ``check`` is given the names of all its files before anything is fetched.
    """
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = parse_hub_id(name)
    revision = wanted.revision or None

    def snapshot(*, offline: bool) -> Path:
        folder = huggingface_hub.snapshot_download(
            wanted.repository,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(ignored),
            local_files_only=offline,
        )
        return Path(folder)

    try:
        info = huggingface_hub.HfApi().model_info(wanted.repository, revision=revision)
    except Exception as error:  # Of the library, or of whichever one makes its connections.
        try:
            folder = snapshot(offline=True)
        except (LocalEntryNotFoundError, ValueError):
            raise _unavailable(name, what, error) from error
        _log.warning(
            "%s: the hub can't be asked (%s); revision %s is used, from the cache",
            name,
            _first_line(error),
            folder.name,
        )
        return folder
    check([file.rfilename for file in info.siblings or ()])
    try:
        return snapshot(offline=False)
    except Exception as error:
        raise _unavailable(name, what, error) from error


def _require_weights(wanted: HubId, files: Sequence[str]) -> None:
    """Refuses a repository that has nothing to load, before it is fetched."""
    vocabularies = [file for file in files if file.endswith(".gguf")]
    if wanted.file:
        if wanted.file not in files:
            raise unknown_name(f"file of {wanted.repository}", wanted.file, vocabularies)
        return
    if any(file.endswith(".safetensors") and "/" not in file for file in files):
        return
    if vocabularies:
        some = ", ".join(f"{wanted.repository}/{file}" for file in vocabularies[:5])
        raise FabricError(
            f"{wanted.repository} holds GGUF files alone", fix=f"Name one of them: {some}"
        )
    pickled = any(file.endswith((".bin", ".pt", ".pth")) for file in files)
    raise FabricError(
        f"{wanted.repository} has no safetensors",
        found="pickles, which can run any code and are not read" if pickled else None,
    )


def _unavailable(name: str, what: str, error: Exception) -> FabricError:
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    fix = "Check the connection and run again, which resumes; or give a file or folder here"
    if isinstance(error, GatedRepoError):
        fix = (
            "Its owner grants access to accounts: ask on its page, then log in with `hf auth login`"
        )
    elif isinstance(error, RevisionNotFoundError | RepositoryNotFoundError):
        fix = "Check the spelling; private repositories need `hf auth login`"
    return FabricError(
        f"cannot get {what} {name} from the hub ({_first_line(error)}), "
        "and there is no such file or folder here",
        fix=fix,
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else repr(error)
