"""The standard-library corpus, tokenised once and shared by every run that asks for it.

Cells of a sweep start at once, and each would learn the same vocabulary and cut the same text. The
first one that comes makes the corpus, the others wait for it; it appears whole or not at all.
"""

import hashlib
import os
import sysconfig
from pathlib import Path

from fabric_jax.data.config import DataConfig
from fabric_jax.data.corpus import Corpus, is_corpus, open_corpus
from fabric_jax.data.load_corpus import corpus_tokenizer, prepare_corpus
from fabric_jax.data.stdlib import STDLIB, stdlib_files
from fabric_jax.files import alone

FOLDER_VARIABLE = "FABRIC_CORPORA"
"""Folder of shared corpora; default ``~/.cache/fabric_jax/corpora``."""


def shared_corpus(*, vocab: int, held_out: float) -> Corpus:
    """The corpus of this machine's standard library, made where it isn't there yet.

    Safe where several processes ask at once: all but one wait.

    Args:
        vocab: tokens of the BPE vocabulary that is learnt from it.
        held_out: share of its documents to evaluate on, chosen by their contents.
    """
    parent = Path(os.environ.get(FOLDER_VARIABLE) or "~/.cache/fabric_jax/corpora").expanduser()
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / f"stdlib-{vocab}-{held_out:g}-{_library()}"
    if not is_corpus(folder):
        # Wider than what keeps the corpus: the vocabulary is learnt once as well.
        with alone(folder.with_name(f"{folder.name}.lock")):
            data = DataConfig(data=STDLIB, eval_fraction=held_out)
            tokenizer = corpus_tokenizer(folder, data, size=vocab, own="")
            prepare_corpus(folder, data, tokenizer, learnt=vocab)
    return open_corpus(folder)


def _library() -> str:
    """Which standard library this is: names and sizes of its files."""
    root = Path(sysconfig.get_path("stdlib"))
    names = [f"{path.relative_to(root)} {path.stat().st_size}" for path in stdlib_files(root)]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]
