"""Hostile chat templates end soon, with a message, and in little memory."""

import time

import pytest

from fabric_jax.data.chat import ChatTemplate
from fabric_jax.data.tokenizer import load_tokenizer
from fabric_jax.errors import FabricError

HOSTILE = {
    "loops": "{% for a in range(9999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops without turns of output": "{% set n = namespace(x=0) %}{% for a in range(99999) %}"
    "{% for b in range(99999) %}{% set n.x = b %}{% endfor %}{% endfor %}",
    "power": "{{ 9 ** 9999999999 }}",
    "power of a power": "{{ (9 ** 9) ** (9 ** 9) }}",
    "repeated text": "{{ 'a' * 9999999999 }}",
    "repeated from the left": "{{ 9999999999 * 'a' }}",
    "repeated list": "{{ ([1] * 9999999999) | length }}",
    "doubling by join": "{% set n = namespace(s='a') %}"
    "{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubling by plus": "{% set n = namespace(s='a') %}"
    "{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "center": "{{ 'a'.center(9999999999) }}",
    "center as a filter": "{{ 'a' | center(9999999999) }}",
    "format": "{{ '%9999999999d' | format(1) }}",
    "format by percent": "{{ '%9999999999d' % 1 }}",
    "format method": "{{ '{:9999999999}'.format(1) }}",
    "much text": "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "range": "{% for a in range(999999999) %}{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_soon(name: str) -> None:
    template = ChatTemplate(load_tokenizer(""), HOSTILE[name])
    start = time.monotonic()
    with pytest.raises(FabricError, match="chat template"):
        template.render([{"role": "user", "content": "hello"}])
    assert time.monotonic() - start < 20


def test_what_templates_do_is_still_done() -> None:
    source = (
        "{%- for m in messages %}{{ loop.index ~ ':' ~ m['role'] + ' ' }}{{ m.content | trim }}"
        "{{ '%s' % m.role }}{{ 2 * 3 }}{{ 'ab' * 2 }}{% endfor -%}"
    )
    template = ChatTemplate(load_tokenizer(""), source)
    text = template.render([{"role": "user", "content": " hi "}]).text
    assert text == "1:user hiuser6abab"
