"""Chat templates: Jinja text that turns messages into the one string a model reads."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast

from fabric_jax.data.template_limits import (
    LENGTH,
    TICK,
    check_arguments,
    check_operator,
    count_turns,
    joined,
    render_within_limits,
    tick,
)
from fabric_jax.data.tokenizer import Tokenizer
from fabric_jax.errors import FabricError

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, Any]
Span = tuple[int, int]

# Written around the body of {% generation %}; Unicode keeps both code points free for such use.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"

CHATML = (
    "{{ bos_token }}{% for m in messages %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROLE_WORDS = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


class Rendered(NamedTuple):
    """A rendered conversation and the spans that ``{% generation %}`` tags marked in it."""

    text: str
    spans: tuple[Span, ...]


class ChatTemplate:
    """A compiled template with the special tokens it writes.

    Args:
        tokenizer: gives the special tokens, and the template unless ``source`` does.
        source: Jinja text.

    Attributes:
        origin: where the template came from, for the summary of the data.
        has_generation_tags: whether it marks the assistant's text itself.
    """

    def __init__(self, tokenizer: Tokenizer, source: str | None = None) -> None:
        """Compiles the template of ``source``, else the tokenizer's, else a default one."""
        source = source or tokenizer.chat_template
        self.origin = "the tokenizer's"
        if not source:
            chatml = all(tokenizer.token_to_id(t) for t in ("<|im_start|>", "<|im_end|>"))
            source = CHATML if chatml else ROLE_WORDS
            self.origin = f"default, the tokenizer has none ({'ChatML' if chatml else 'User: …'})"
        self._template = _compile(source)
        self.has_generation_tags = _OPEN in _literal_text(source)
        self.special_tokens = tuple(tokenizer.token_text(i) for i in tokenizer.special_ids)
        self._variables = {
            "bos_token": tokenizer.token_text(tokenizer.bos_id),
            "eos_token": tokenizer.token_text(tokenizer.eos_id),
            "pad_token": tokenizer.token_text(tokenizer.pad_id),
        }

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> Rendered:
        """The conversation as text, with what opens an assistant turn if asked.

        Raises:
            FabricError: the template refuses the messages, or fails.
        """
        from jinja2 import TemplateError

        try:
            text = render_within_limits(
                self._template,
                {
                    "messages": list(messages),
                    "tools": None if tools is None else list(tools),
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                    **self._variables,
                },
            )
        except (TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:
            raise FabricError(f"the chat template fails on these messages: {error}") from error
        if not self.has_generation_tags:
            return Rendered(text, ())
        values = json.dumps(list(messages), ensure_ascii=False, default=str)
        if _OPEN in values or _CLOSE in values:
            raise FabricError(
                "a message holds U+FDD0 or U+FDD1, with which generation tags are followed",
                fix="Remove these noncharacters from the data",
            )
        return _cut_markers(text)


def chat_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The text after which the model is to answer ``messages``; special tokens are spelled out."""
    return ChatTemplate(tokenizer).render(messages, tools=tools, add_generation_prompt=True).text


def _cut_markers(text: str) -> Rendered:
    """Removes the marks of generation tags and returns the spans between them."""
    parts: list[str] = []
    spans: list[Span] = []
    length = start = 0
    for piece in text.replace(_CLOSE, _OPEN).split(_OPEN):
        parts.append(piece)
        length += len(piece)
        if len(parts) % 2 == 0:
            spans.append((start, length))
        start = length
    return Rendered("".join(parts), tuple(spans))


def _literal_text(source: str) -> str:
    """What the template writes itself, as opposed to the values of its variables."""
    from jinja2 import nodes

    tree = _environment().parse(source)
    return "".join(node.data for node in tree.find_all(nodes.TemplateData))


@cache
def _compile(source: str) -> "Template":
    from jinja2 import TemplateSyntaxError

    try:
        return _environment().from_string(source)
    except TemplateSyntaxError as error:
        raise FabricError(f"chat template, line {error.lineno}: {error.message}") from error


@cache
def _environment() -> Any:
    """A sandbox with the names, tags and filters that published chat templates use."""
    from jinja2 import Environment, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}…{% endgeneration %}``: the text that the assistant wrote."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            """Puts a mark before and after the body."""
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            before, after = (
                nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (_OPEN, _CLOSE)
            )
            return [before, *body, after]

    class Limited(ImmutableSandboxedEnvironment):
        """The sandbox, with bounds on time and size (``template_limits``)."""

        intercepted_binops = frozenset(["*", "+", "**", "%"])

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            return count_turns(super()._parse(source, name, filename))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            """Refuses what would be too long."""
            check_operator(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(self, *values: Any, **named: Any) -> Any:
            """Refuses what would be too long."""
            check_arguments([*values[1:], *named.values()])
            return super().call(*values, **named)

    environment: Environment = Limited(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    # Jinja's own filter escapes HTML characters, which models never saw.
    environment.filters["tojson"] = _to_json
    for name, filter_ in list(environment.filters.items()):
        environment.filters[name] = _limited(filter_)
    functions = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    functions |= {TICK: tick, LENGTH: joined}
    cast(dict[str, Any], environment.globals).update(functions)
    return environment


def _limited(filter_: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that refuses arguments which stand for too long a text."""

    @wraps(filter_)
    def limited(*values: Any, **named: Any) -> Any:
        # A number in front of the bar is a value; the environment that some filters get is none.
        check_arguments([*values[1:], *named.values()])
        check_arguments(value for value in values[:2] if isinstance(value, str))
        return filter_(*values, **named)

    return limited


def _raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
