"""Between text and token ids, on both sides of a generating model."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from fabric_jax.data.chat import chat_prompt
from fabric_jax.data.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or the messages of a conversation that the model is to answer."""


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Token ids of a prompt.

    Text starts with begin-of-text where the vocabulary's documents do. Messages go through the chat
    template, which spells its own special tokens. Token ids are taken as they are.
    """
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, add_special=True)
    if prompt and isinstance(prompt[0], Mapping):
        messages = cast(Sequence[Mapping[str, Any]], prompt)
        return tokenizer.encode(chat_prompt(tokenizer, messages))
    return [int(i) for i in cast(Sequence[int], prompt)]


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
