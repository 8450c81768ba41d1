"""Rows, tokens and batches."""

from fabric_jax.data.batch import Batch
from fabric_jax.data.config import DataConfig
from fabric_jax.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Batch", "DataConfig", "Tokenizer", "load_tokenizer"]
