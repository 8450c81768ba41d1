"""From prompts to tokens."""

from fabric_jax.generation.config import GenerationConfig
from fabric_jax.generation.generator import Generated, Generator, make_generator
from fabric_jax.generation.prompts import Prompt, decode_continuation, encode_prompt

__all__ = [
    "Generated",
    "GenerationConfig",
    "Generator",
    "Prompt",
    "decode_continuation",
    "encode_prompt",
    "make_generator",
]
