"""Between text and token ids, on both sides of a generating model."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from fabric_jax.data.chat import chat_prompt
from fabric_jax.data.tokenizer import Tokenizer
from fabric_jax.errors import FabricError

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or the messages of a conversation that the model is to answer."""


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Token ids of a prompt.

    Text starts with begin-of-text where the vocabulary's documents do. Messages go through the chat
    template, which spells its own special tokens. Token ids are taken as they are.

    Raises:
        FabricError: ``prompt`` is none of these, or the chat template refuses the messages.
    """
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, add_special=True)
    items = _items(prompt)
    if items and all(isinstance(item, Mapping) for item in items):
        messages = cast(Sequence[Mapping[str, Any]], items)
        return tokenizer.encode(chat_prompt(tokenizer, messages))
    if all(isinstance(item, int | np.integer) for item in items):
        return [int(cast(int, item)) for item in items]
    raise _not_a_prompt(prompt)


def _items(prompt: object) -> list[object]:
    """The elements of a sequence; one prompt in the place of several is a likely mistake."""
    if isinstance(prompt, Sequence | np.ndarray):
        return list(cast(Sequence[object], prompt))
    raise _not_a_prompt(prompt)


def _not_a_prompt(prompt: object) -> FabricError:
    return FabricError(
        "this is no prompt",
        expected="a text, a list of messages or a list of token ids",
        found=repr(prompt)[:80],
        fix="Prompts are given as a list, a single one too unless it is a text",
    )


def decode_continuation(tokenizer: Tokenizer, prompt: Sequence[int], answer: Sequence[int]) -> str:
    """The text that ``answer`` adds to ``prompt``, special tokens left out.

    Vocabularies that mark spaces drop the first one of a text, so the answer is decoded behind its
    prompt and the prompt's text cut off. Where that isn't a prefix (a character that ends in the
    answer), the answer is decoded alone.
    """
    before = tokenizer.decode(prompt, skip_special=True)
    whole = tokenizer.decode([*prompt, *answer], skip_special=True)
    if whole.startswith(before):
        return whole[len(before) :]
    return tokenizer.decode(answer, skip_special=True)
