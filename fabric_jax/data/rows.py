"""The kinds of rows, told apart by their keys."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from fabric_jax.errors import FabricError, unknown_name

# A row is of the first kind all of whose keys it has.
KINDS: tuple[tuple[str, ...], ...] = (
    ("messages",),
    ("prompt", "completion"),
    ("question", "answer"),
    ("text",),
)
KNOWN_KEYS = (*(key for kind in KINDS for key in kind), "label", "tools")
ANSWER_CUE = "\nA:"

RowKind = Literal["messages", "prompt/completion", "question/answer", "text", "labelled text"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row, its kind recognised.

    Attributes:
        kind: which keys it had.
        where: file and line, for messages.
        text: all of its text; empty for messages.
        answer_start: first character of the completion or answer, None where there is none.
        messages: the turns of a conversation.
        tools: tools that the conversation offers.
        label: class of a labelled row.
    """

    kind: RowKind
    where: str
    text: str = ""
    answer_start: int | None = None
    messages: Sequence[Mapping[str, Any]] = field(default=())
    tools: Sequence[Mapping[str, Any]] | None = None
    label: str | None = None


def parse_row(record: Mapping[str, Any], where: str) -> Row:
    """Recognises a row.

    A labelled row of text is expected to read "Q: …" and, on a line of its own, "A: …"; what
    follows "A:" is its answer.

    Raises:
        FabricError: no kind fits the keys, or a value has the wrong type.
    """
    kind = next((kind for kind in KINDS if all(_has(record, key) for key in kind)), None)
    label = None if record.get("label") is None else str(record["label"])
    if kind is None:
        raise _no_kind(record, where)
    if kind == ("messages",):
        messages = _messages(record["messages"], where)
        return Row(
            kind="messages",
            where=where,
            messages=messages,
            tools=_tools(record, where),
            label=label,
        )
    values = [_string(record, key, where) for key in kind]
    if kind == ("text",):
        return _text_row(values[0], label, where)
    if kind == ("question", "answer"):
        first, second = f"Q: {values[0]}{ANSWER_CUE}", f" {values[1]}"
        name: RowKind = "question/answer"
    else:
        first, second = values
        name = "prompt/completion"
    return Row(kind=name, where=where, text=first + second, answer_start=len(first), label=label)


def parse_columns(columns: Sequence[str]) -> dict[str, str]:
    """Reads ``known=column`` pairs.

    Raises:
        FabricError: a pair without "=", or a name on the left that no kind of row has.
    """
    pairs: dict[str, str] = {}
    for pair in columns:
        known, separator, column = pair.partition("=")
        if not separator or not column:
            raise FabricError(f"cannot read columns {pair!r}", expected="known=column")
        if known not in KNOWN_KEYS:
            raise unknown_name("row key", known, KNOWN_KEYS)
        pairs[known] = column
    return pairs


def rename(record: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Mapping[str, Any]:
    """The known keys of ``record`` after renaming; other kinds' keys give way to renamed ones."""
    if not columns:
        return record
    for column in columns.values():
        if column not in record:
            raise unknown_name(f"column of {where},", column, record)
    renamed = {known: record[column] for known, column in columns.items()}
    kept = {key: record[key] for key in ("label", "tools") if key in record}
    return kept | {key: record[key] for key in record if key in _partners(columns)} | renamed


def _partners(columns: Mapping[str, str]) -> set[str]:
    """Keys that complete the kinds which the renamed keys belong to."""
    return {key for kind in KINDS if set(kind) & set(columns) for key in kind}


def _has(record: Mapping[str, Any], key: str) -> bool:
    """Tables fill what a row lacks with null, so null is absence; a lone null text is empty."""
    if record.get(key) is not None:
        return True
    return (
        key == "text"
        and "text" in record
        and not any(record.get(other) is not None for kind in KINDS for other in kind)
    )


def _text_row(text: str, label: str | None, where: str) -> Row:
    cue = text.find(ANSWER_CUE)
    return Row(
        kind="text" if label is None else "labelled text",
        where=where,
        text=text,
        answer_start=None if cue < 0 else cue + len(ANSWER_CUE),
        label=label,
    )


def _string(record: Mapping[str, Any], key: str, where: str) -> str:
    value = record[key]
    if value is None:
        return ""
    if not isinstance(value, str):
        fix = "Give conversations as messages" if isinstance(value, list) else None
        raise FabricError(
            f"{where}: {key} is not text", expected="a string", found=_type(value), fix=fix
        )
    return value


def _messages(value: object, where: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not value:
        raise FabricError(
            f"{where}: messages is not a conversation",
            expected="a list of messages",
            found="an empty list" if value == [] else _type(value),
        )
    return [_message(turn, f"{where}, message {i + 1}") for i, turn in enumerate(cast(Any, value))]


def _message(turn: object, where: str) -> Mapping[str, Any]:
    """One checked turn: null fields left out, content in text parts joined."""
    if not isinstance(turn, Mapping):
        raise FabricError(f"{where} is not an object", expected="role and content")
    fields = {k: v for k, v in cast(Mapping[str, Any], turn).items() if v is not None}
    if not isinstance(fields.get("role"), str):
        raise FabricError(f"{where} has no role", found=f"keys {', '.join(fields) or 'none'}")
    content = fields.get("content")
    if isinstance(content, list):
        fields["content"] = "".join(_part(p, where) for p in cast(list[object], content))
    elif content is None and "tool_calls" not in fields:
        raise FabricError(f"{where} has no content", found=f"keys {', '.join(fields)}")
    elif content is not None and not isinstance(content, str):
        raise FabricError(f"{where}: content is not text", found=_type(content))
    return fields


def _part(part: object, where: str) -> str:
    text = cast(Mapping[str, Any], part).get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        raise FabricError(f"{where} has a part that isn't text", expected='{"type": "text", …}')
    return text


def _tools(record: Mapping[str, Any], where: str) -> Sequence[Mapping[str, Any]] | None:
    tools = record.get("tools")
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list):
        raise FabricError(f"{where}: tools is not a list", found=_type(tools))
    return cast(list[Mapping[str, Any]], tools)


def _type(value: object) -> str:
    names = {"NoneType": "null", "dict": "an object", "list": "a list", "bool": "a boolean"}
    names |= {"int": "a number", "float": "a number", "str": "a string"}
    return names.get(type(value).__name__, type(value).__name__)


def _no_kind(record: Mapping[str, Any], where: str) -> FabricError:
    keys = [key for key in record if record[key] is not None]
    wanted = {key for kind in KINDS for key in kind}
    incomplete = next((kind for kind in KINDS if set(kind) & set(keys)), None)
    fix = "Name other columns with --columns, e.g. text=body"
    for key in keys:
        if incomplete is None and (close := difflib.get_close_matches(key, wanted, n=1)):
            fix = f"Did you mean {close[0]!r} for {key!r}?"
            break
    if incomplete is not None:
        missing = next(key for key in incomplete if key not in keys)
        has = next(key for key in incomplete if key in keys)
        close = difflib.get_close_matches(missing, keys, n=1)
        hint = f". Did you mean {missing!r} for {close[0]!r}?" if close else ""
        return FabricError(f"{where}: {has} without {missing}{hint}", found=_listed(keys), fix=fix)
    return FabricError(
        f"{where}: no known column",
        expected="messages, prompt and completion, question and answer, or text",
        found=_listed(keys),
        fix=fix,
    )


def _listed(keys: Sequence[str]) -> str:
    return ", ".join(keys) or "an empty row"
