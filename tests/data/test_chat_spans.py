"""Which characters and tokens of a conversation are trained on.

The templates follow the published formats of their families; the expected text is written out.
"""

import numpy as np
import pytest

from fabric_jax.data.chat import ChatTemplate, chat_prompt
from fabric_jax.data.chat_spans import assistant_spans, tokens_in_spans
from fabric_jax.data.tokenizer import Tokenizer, byte_tokenizer
from fabric_jax.errors import FabricError

SPECIALS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|end|>",
    "<|endoftext|>",
]
TALK = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "assistant\nSure?"},
    {"role": "assistant", "content": "  Yes: 4.\nReally "},
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim "
    "+ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
BITNET = (
    "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
)
LLAMA2 = (  # has no generation prompt
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (  # ends the whole with another token unless a turn is to follow
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
)
THINKING = (  # the generation prompt opens a block that is left out of the history
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}> {{ m.content }}\n\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.backend.add_special_tokens(SPECIALS)
    return tokenizer


@pytest.mark.parametrize(
    ("template", "turns"),
    [
        pytest.param(CHATML, ["4<|im_end|>", "  Yes: 4.\nReally <|im_end|>"], id="chatml"),
        pytest.param(LLAMA3, ["4<|eot_id|>", "Yes: 4.\nReally<|eot_id|>"], id="llama 3"),
        pytest.param(GEMMA, ["4<end_of_turn>", "Yes: 4.\nReally<end_of_turn>"], id="gemma"),
        pytest.param(BITNET, ["4<|eot_id|>", "Yes: 4.\nReally<|eot_id|>"], id="bitnet 2b-4t"),
        pytest.param(LLAMA2, ["4 <|eos|>", "Yes: 4.\nReally <|eos|>"], id="llama 2"),
        pytest.param(PHI3, ["4<|end|>", "  Yes: 4.\nReally <|end|>"], id="phi 3"),
        pytest.param(THINKING, ["4<|im_end|>", "  Yes: 4.\nReally <|im_end|>"], id="thinking"),
        pytest.param(PLAIN, ["4", "  Yes: 4.\nReally "], id="no end of turn"),
    ],
)
def test_spans_are_content_and_end_of_turn(
    tokenizer: Tokenizer, template: str, turns: list[str]
) -> None:
    rendered = assistant_spans(ChatTemplate(tokenizer, template), TALK)
    assert [rendered.text[a:b] for a, b in rendered.spans] == turns
    encoded = tokenizer.encode_with_offsets(rendered.text)
    marked = tokens_in_spans(encoded.offsets, rendered.spans)
    assert tokenizer.decode(encoded.ids[marked].tolist()) == "".join(turns)


def test_generation_tags_give_the_spans_themselves(tokenizer: Tokenizer) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}"
        "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}U: {{ m.content }}{% endif %}"
        "{{ '\n' }}{% endfor %}"
    )
    rendered = assistant_spans(ChatTemplate(tokenizer, template), TALK)
    assert [rendered.text[a:b] for a, b in rendered.spans] == [
        "4<|im_end|>",
        "  Yes: 4.\nReally <|im_end|>",
    ]
    assert rendered.text.startswith("U: What is 2+2?\nA: 4<|im_end|>\n")


@pytest.mark.parametrize("contents", [["x", "x"], ["", "a"], ["x" * 3, " x "], ["User", "é🙂"]])
def test_contents_that_look_like_probes_or_other_turns(
    tokenizer: Tokenizer, contents: list[str]
) -> None:
    talk = [
        {"role": "user", "content": contents[0]},
        {"role": "assistant", "content": contents[0]},
        {"role": "user", "content": contents[1]},
        {"role": "assistant", "content": contents[1]},
    ]
    for template in (CHATML, THINKING, PHI3):
        rendered = assistant_spans(ChatTemplate(tokenizer, template), talk)
        end = "<|end|>" if template == PHI3 else "<|im_end|>"
        assert [rendered.text[a:b] for a, b in rendered.spans] == [c + end for c in contents]


def test_a_turn_of_tool_calls_is_trained_on(tokenizer: Tokenizer) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    calls = [{"name": "f", "arguments": {"q": "<é>"}}]
    talk = [TALK[0], {"role": "assistant", "tool_calls": calls}, {"role": "tool", "content": "1"}]
    rendered = assistant_spans(ChatTemplate(tokenizer, template), talk)
    expected = '[{"name": "f", "arguments": {"q": "<é>"}}]<|im_end|>'
    assert [rendered.text[a:b] for a, b in rendered.spans] == [expected]


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Tokenizer) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: "
        "{{ m.content if loop.last else m.content | upper }}<|im_end|>{% endfor %}"
    )
    talk = [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "no"}]
    with pytest.raises(FabricError, match=r"turn 1 differently once later messages"):
        assistant_spans(ChatTemplate(tokenizer, template), talk)


def test_a_template_that_leaves_content_out_is_refused(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(tokenizer, "{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(FabricError, match="leaves out the content of message 2"):
        assistant_spans(template, TALK[:2])


def test_templates_may_raise_and_use_what_published_ones_use(tokenizer: Tokenizer) -> None:
    with pytest.raises(FabricError, match="System role not supported"):
        ChatTemplate(tokenizer, GEMMA).render([{"role": "system", "content": "x"}])
    template = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% if ns.n > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}{{ ns.n }}"
        "{{ strftime_now('%Y')[:2] }}{{ tools is none }}"
    )
    text = ChatTemplate(tokenizer, template).render([{"a": "<é>"}, {}]).text
    assert text == '{"a": "<é>"}220True'


def test_templates_cannot_reach_python(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(tokenizer, "{{ messages.__class__.__mro__ }}")
    with pytest.raises(FabricError, match="unsafe"):
        template.render(TALK)


def test_a_syntax_error_names_the_line(tokenizer: Tokenizer) -> None:
    with pytest.raises(FabricError, match=r"chat template, line 2: .*endfor"):
        ChatTemplate(tokenizer, "a\n{% endfor %}")


def test_default_template_speaks_roles_or_chatml(tokenizer: Tokenizer) -> None:
    words = chat_prompt(byte_tokenizer(), TALK[:3])
    assert (
        words == "<|bos|>User: What is 2+2?\nAssistant: 4<|eos|>User: assistant\nSure?\nAssistant:"
    )
    template = ChatTemplate(byte_tokenizer())
    rendered = assistant_spans(template, TALK[:2])
    assert [rendered.text[a:b] for a, b in rendered.spans] == [" 4<|eos|>"]
    assert "default" in template.origin
    assert chat_prompt(tokenizer, TALK[:1]).endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_noncharacters_in_tagged_conversations_are_refused(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(
        tokenizer, "{% generation %}{{ messages[0].content }}{% endgeneration %}"
    )
    with pytest.raises(FabricError, match=r"U\+FDD0"):
        template.render([{"role": "assistant", "content": "a\ufdd0"}])


@pytest.mark.oracle
def test_masks_equal_transformers(oracle, tokenizer: Tokenizer) -> None:
    (transformers,) = oracle("transformers")
    template = CHATML.replace(
        "{{ m.content }}<|im_end|>\n",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}",
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend)
    theirs = fast.apply_chat_template(
        TALK,
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    tagged = assistant_spans(ChatTemplate(tokenizer, template), TALK)
    derived = assistant_spans(ChatTemplate(tokenizer, CHATML), TALK)
    assert tagged.spans == derived.spans
    for text, spans in (tagged, derived):
        encoded = tokenizer.encode_with_offsets(text)
        assert encoded.ids.tolist() == theirs["input_ids"]
        mask = tokens_in_spans(encoded.offsets, spans)
        np.testing.assert_array_equal(mask, np.asarray(theirs["assistant_masks"], bool))


@pytest.mark.oracle
@pytest.mark.parametrize(
    "template",
    [CHATML, LLAMA3, GEMMA, BITNET, LLAMA2, PHI3],
    ids=["chatml", "llama3", "gemma", "bitnet", "llama2", "phi3"],
)
def test_text_equals_transformers(oracle, tokenizer: Tokenizer, template: str) -> None:
    (transformers,) = oracle("transformers")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend, bos_token="<|bos|>", eos_token="<|eos|>"
    )
    for prompt in (False, True):
        theirs = fast.apply_chat_template(
            TALK, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
        ours = ChatTemplate(tokenizer, template).render(TALK, add_generation_prompt=prompt)
        assert ours.text == theirs
