"""Prompts to ids and answers back to text."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric_jax.data.tokenizer import byte_tokenizer
from fabric_jax.errors import FabricError
from fabric_jax.generation.prompts import decode_continuation, encode_prompt

BYTES = byte_tokenizer()


def test_text_starts_with_begin_of_text_where_documents_do():
    assert encode_prompt(BYTES, "Hi") == [BYTES.bos_id, 72, 105]
    assert encode_prompt(dataclasses.replace(BYTES, add_bos=False), "Hi") == [72, 105]


def test_messages_go_through_the_chat_template_once():
    template = "{{ bos_token }}{% for m in messages %}<{{ m.content }}>{% endfor %}" + (
        "{% if add_generation_prompt %}ANSWER:{% endif %}"
    )
    tokenizer = dataclasses.replace(BYTES, chat_template=template)
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "Hi"}])
    assert ids == [BYTES.bos_id, *b"<Hi>ANSWER:"]


@pytest.mark.parametrize(
    "prompt", [[3, 1, 2], (3, 1, 2), np.array([3, 1, 2], np.int32)], ids=["list", "tuple", "array"]
)
def test_token_ids_are_taken_as_they_are(prompt):
    assert encode_prompt(BYTES, prompt) == [3, 1, 2]


@pytest.mark.parametrize(
    "prompt", [5, {"role": "user"}, [1.5], ["a", "b"], None, [{"role": "user"}, 3]],
    ids=["id", "message", "floats", "texts", "none", "mixed"],
)  # fmt: skip
def test_what_is_no_prompt_is_refused(prompt):
    with pytest.raises(FabricError, match=r"no prompt; expected a text.*given as a list"):
        encode_prompt(BYTES, prompt)


SPECIAL = re.compile(r"<\|(?:pad|bos|eos)\|>")


# Spelled out, a special token is that token, which decoding leaves out.
@given(st.text(max_size=12), st.text(max_size=12).filter(lambda text: not SPECIAL.search(text)))
def test_the_answer_is_what_it_adds_to_the_prompt(prompt, answer):
    ids = BYTES.encode(prompt, add_special=True)
    assert decode_continuation(BYTES, ids, BYTES.encode(answer)) == answer


def test_special_tokens_are_left_out():
    assert decode_continuation(BYTES, [BYTES.bos_id, 72], [105, BYTES.eos_id, 33]) == "i!"


def test_a_character_split_between_prompt_and_answer():
    first, *rest = "é!".encode()
    assert decode_continuation(BYTES, [72, first], rest) == "\ufffd!"


def test_the_first_space_survives_vocabularies_that_mark_spaces(shared_data):
    from fabric_jax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(shared_data / "vocab" / "llama-spm.gguf")
    prompt, whole = "Q: is it?\nA:", "Q: is it?\nA: Yes, it is."
    ids, all_ids = encode_prompt(tokenizer, prompt), encode_prompt(tokenizer, whole)
    assert all_ids[: len(ids)] == ids
    assert decode_continuation(tokenizer, ids, all_ids[len(ids) :]) == " Yes, it is."
