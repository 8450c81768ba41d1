"""From prompts to tokens."""

from fabric_jax.generation.config import GenerationConfig
from fabric_jax.generation.generator import Generator, make_generator
from fabric_jax.generation.prompts import Prompt, decode_continuation, encode_prompt
from fabric_jax.generation.session import Cached, Generated, Session, Stats
from fabric_jax.generation.text import TextStream

__all__ = [
    "Cached",
    "Generated",
    "GenerationConfig",
    "Generator",
    "Prompt",
    "Session",
    "Stats",
    "TextStream",
    "decode_continuation",
    "encode_prompt",
    "make_generator",
]
