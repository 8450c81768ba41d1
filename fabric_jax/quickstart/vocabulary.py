"""A vocabulary learnt from the quickstart's own sentences."""

from collections.abc import Sequence

from fabric_jax.data.bpe import BOS as BOS
from fabric_jax.data.bpe import EOS as EOS
from fabric_jax.data.bpe import PAD as PAD
from fabric_jax.data.bpe import train_bpe

LARGEST = 1024


def train_vocabulary(texts: Sequence[str], *, largest: int = LARGEST) -> bytes:
    """Byte-level BPE of ``texts``, as ``tokenizer.json``; see ``data.bpe``."""
    return train_bpe(texts, largest=largest)
