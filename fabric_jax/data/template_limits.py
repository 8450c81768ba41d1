"""Bounds on what a chat template may compute: a checkpoint's template is a stranger's program.

Jinja's sandbox keeps templates from Python's internals and from changing what they are given, not
from running for ever or filling the memory. So every turn of a loop and every call of a macro is
counted, operators and calls that make long strings are looked at first, and the text is counted as
it is written.
"""

import re
import threading
import time
from typing import TYPE_CHECKING, Any, cast

from fabric_jax.errors import FabricError

if TYPE_CHECKING:
    from jinja2 import Template, nodes

MOST_TURNS = 200_000
MOST_CHARACTERS = 50_000_000
MOST_SECONDS = 5.0
TICK = "__tick"
LENGTH = "__length"
_WIDTH = re.compile(r"[%{][^%{}]{0,20}?\d{9}")

_spent = threading.local()


def render_within_limits(template: "Template", variables: dict[str, Any]) -> str:
    """The text of a template.

    Raises:
        FabricError: it takes more turns, characters or seconds than any conversation does.
    """
    _spent.turns, _spent.deadline = 0, time.monotonic() + MOST_SECONDS
    parts: list[str] = []
    written = 0
    try:
        for part in template.generate(**variables):
            written += len(part)
            if written > MOST_CHARACTERS:
                raise _too_much(f"more than {MOST_CHARACTERS:,} characters")
            parts.append(part)
    except (RecursionError, MemoryError, OverflowError) as error:
        raise _too_much(type(error).__name__) from error
    return "".join(parts)


def tick() -> str:
    """Counts a turn; writes nothing."""
    _spent.turns = getattr(_spent, "turns", 0) + 1
    if _spent.turns > MOST_TURNS:
        raise _too_much(f"more than {MOST_TURNS:,} turns of loops")
    if _spent.turns % 1000 == 0 and time.monotonic() > _spent.deadline:
        raise _too_much(f"more than {MOST_SECONDS:g} seconds")
    return ""


def count_turns(tree: "nodes.Template") -> "nodes.Template":
    """The parsed template with a call of :func:`tick` in every loop and macro.

    What ``~`` joins is looked at before it is joined.
    """
    from jinja2 import nodes

    for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
        call = nodes.Call(nodes.Name(TICK, "load"), [], [], None, None)
        node.body.insert(0, nodes.Output([call]))
        node.set_lineno(node.lineno)
    for node in tree.find_all(nodes.Concat):
        check = nodes.Call(nodes.Name(LENGTH, "load"), node.nodes, [], None, None)
        node.nodes = [check]
        node.set_lineno(node.lineno)
    # New nodes need the environment of the others.
    tree.set_environment(cast(Any, tree.environment))
    return tree


def joined(*parts: Any) -> str:
    """The parts as one text, unless it is too long."""
    texts = [str(part) for part in parts]
    _refuse_length(sum(map(len, texts)))
    return "".join(texts)


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Refuses operators whose result would be too long, before they run."""
    match operator:
        case "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str | list | tuple) and isinstance(other, int):
                    _refuse_length(len(cast(str, one)) * max(other, 0))
        case "+":
            if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
                _refuse_length(len(cast(str, left)) + len(cast(str, right)))
        case "**" if isinstance(left, int) and isinstance(right, int):
            _refuse_length(left.bit_length() * max(right, 0))
        case "%" if isinstance(left, str):
            _refuse_width(left)
        case _:
            pass


def check_arguments(arguments: Any) -> None:
    """Refuses calls of methods and filters with numbers that stand for too long a text.

    Of a method, what it is bound to is one of them.
    """
    for argument in arguments:
        # Jinja wraps str.format.
        method = getattr(argument, "__wrapped__", argument)
        argument = getattr(method, "__self__", argument)
        if isinstance(argument, int):
            _refuse_length(argument)
        elif isinstance(argument, str):
            _refuse_width(argument)


def _refuse_width(form: str) -> None:
    """Formats like ``%999999999d`` and ``{:999999999}`` ask for a width."""
    if _WIDTH.search(form):
        raise _too_much("a width of more than 8 digits")


def _refuse_length(length: int) -> None:
    if length > MOST_CHARACTERS:
        raise _too_much(f"more than {MOST_CHARACTERS:,} characters")


def _too_much(what: str) -> FabricError:
    return FabricError(
        f"the chat template takes too much: {what}",
        fix="Give another one with --chat-template",
    )
