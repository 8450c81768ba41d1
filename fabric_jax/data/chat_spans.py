"""Which characters of a rendered conversation, and so which tokens, the assistant wrote."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fabric_jax.data.chat import ChatTemplate, Message, Rendered, Span
from fabric_jax.errors import FabricError


def assistant_spans(
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Rendered:
    """Renders ``messages`` and finds each assistant turn: its content and its end-of-turn token.

    Templates with ``{% generation %}`` tags say it themselves. For the others a turn starts where
    the generation prompt ends, which is where the model takes over, and ends with the first special
    token after its content (without one, before the white space that closes the turn).

    Raises:
        FabricError: the template writes earlier turns in another way once later ones follow, so
            that no span of the whole is what the model would have had to write.
    """
    whole = template.render(messages, tools=tools)
    if template.has_generation_tags:
        return whole
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    finder = _TurnFinder(template, messages, tools, whole.text)
    return Rendered(whole.text, tuple(finder.span(i) for i in turns))


def tokens_in_spans(offsets: NDArray[np.int64], spans: Sequence[Span]) -> NDArray[np.bool_]:
    """Marks the tokens that hold a character of a span.

    Args:
        offsets: int64 [n, 2], the half-open span of characters of each token.
        spans: half-open spans of characters.

    Returns:
        bool [n].
    """
    starts, ends = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
    marked = np.zeros(len(offsets), np.bool_)
    for start, end in spans:
        marked |= (starts < end) & (ends > start)
    return marked


class _TurnFinder:
    """Finds turns of one conversation by rendering parts of it."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        whole: str,
    ) -> None:
        self._template = template
        self._messages = messages
        self._tools = tools
        self._whole = whole

    def span(self, i: int) -> Span:
        """The span of assistant turn ``i`` in the whole conversation."""
        last = i + 1 == len(self._messages)
        through = self._whole if last else self._render(self._messages[: i + 1])
        content = self._messages[i].get("content")
        start = self._generation_start(i, through)
        if isinstance(content, str):
            content_end = None if start is None else _content_end(through, start, content)
            if start is None or content_end is None:
                found, content_end = self._probe(i, through, content)
                start = found if start is None else start
            end = self._turn_end(through, content_end)
        elif start is not None:  # a turn of tool calls: all that was written in it
            end = len(through.rstrip())
        else:
            raise FabricError(
                f"message {i + 1}: an assistant turn without content cannot be found in the text",
                fix="Use a chat template with {% generation %} tags or a generation prompt",
            )
        if self._whole[:end] != through[:end]:
            raise FabricError(
                f"the chat template writes assistant turn {i + 1} differently once later messages "
                "follow, so the text to train on is not what the model would write",
                fix="Use a template with {% generation %} tags, or rows that end with that turn",
            )
        return start, end

    def _render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        return self._template.render(messages, tools=self._tools, add_generation_prompt=prompt).text

    def _generation_start(self, i: int, through: str) -> int | None:
        """Where the generation prompt of turn ``i`` ends, None where the template has none."""
        before = self._messages[:i]
        if not before:
            return None
        prompt = self._render(before, prompt=True)
        if prompt == self._render(before) or not through.startswith(prompt):
            return None
        return len(prompt)

    def _probe(self, i: int, through: str, content: str) -> Span:
        """The span of the content of turn ``i``: what changes when the content does."""
        edges = {*content[:1], *content.strip()[:1], *content[-1:], *content.strip()[-1:]}
        letter = next(letter for letter in "xyzuv" if letter not in edges)
        changed = {**self._messages[i], "content": letter * 2}
        other = self._render([*self._messages[:i], changed])
        if other == through:
            raise FabricError(f"the chat template leaves out the content of message {i + 1}")
        start = _common(through, other)
        behind = _common(through[start:][::-1], other[start:][::-1])
        return start, len(through) - behind

    def _turn_end(self, through: str, content_end: int) -> int:
        """Behind the first special token after the content, else before closing white space."""
        tail = through[content_end:]
        found = [(tail.find(t), len(t)) for t in self._template.special_tokens if t in tail]
        if found:
            return content_end + sum(min(found, key=lambda hit: (hit[0], -hit[1])))
        return content_end + len(tail.rstrip())


def _content_end(through: str, start: int, content: str) -> int | None:
    """The end of ``content`` where it stands right at ``start``, as it is or stripped."""
    for text in (content, content.strip()):
        if text and through.startswith(text, start):
            return start + len(text)
    return None


def _common(first: str, second: str) -> int:
    """The length of the common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
