"""Rows, tokens and batches."""

from fabric_jax.data.batch import Batch
from fabric_jax.data.batch_stream import BatchStream
from fabric_jax.data.chat import chat_prompt
from fabric_jax.data.config import DataConfig
from fabric_jax.data.load import Data, EvaluationData, load_data, load_evaluation
from fabric_jax.data.summary import DataSummary
from fabric_jax.data.tokenize_rows import LabelledRow
from fabric_jax.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "BatchStream",
    "Data",
    "DataConfig",
    "DataSummary",
    "EvaluationData",
    "LabelledRow",
    "Tokenizer",
    "chat_prompt",
    "load_data",
    "load_evaluation",
    "load_tokenizer",
]
