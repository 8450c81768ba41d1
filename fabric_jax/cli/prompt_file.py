"""Files of prompts, and the answers to them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fabric_jax.errors import FabricError
from fabric_jax.files import write_atomically

if TYPE_CHECKING:
    from fabric_jax.generation.prompts import Prompt
    from fabric_jax.model import Completion


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """One row of a file.

    Attributes:
        prompt: text, or messages.
        adapter: the one to use; None for the base alone.
        given: the row as it stood in the file, to go with its answer.
    """

    prompt: "Prompt"
    adapter: str | None
    given: dict[str, Any]


def read_prompts(path: str) -> list[PromptRow]:
    """The rows of a JSONL file, or the lines of any other.

    Raises:
        FabricError: the file can't be read, holds no prompt, or a row is malformed; names it.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FabricError(f"cannot read the prompts {path}: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise FabricError(f"{path} holds no prompt")
    if Path(path).suffix in (".jsonl", ".json"):
        return [_row(f"{path}, line {number}", line) for number, line in numbered]
    return [PromptRow(prompt=line, adapter=None, given={"prompt": line}) for _, line in numbered]


def _row(where: str, line: str) -> PromptRow:
    try:
        value: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise FabricError(f"{where}: this is no JSON: {error.msg}") from error
    expected = 'an object with "prompt" (a text) or "messages" (a list of objects)'
    if not isinstance(value, dict):
        raise FabricError(f"{where}: this is no prompt", expected=expected, found=line[:80])
    row = cast(dict[str, Any], value)
    prompt, messages, adapter = row.get("prompt"), row.get("messages"), row.get("adapter")
    if not isinstance(adapter, str | None):
        raise FabricError(f"{where}: the adapter is a name", found=repr(adapter)[:80])
    if isinstance(prompt, str) and messages is None:
        return PromptRow(prompt=prompt, adapter=adapter, given=row)
    if prompt is None and isinstance(messages, list) and messages:
        turns = cast(list[Any], messages)
        if all(isinstance(turn, dict) for turn in turns):
            return PromptRow(prompt=turns, adapter=adapter, given=row)
    raise FabricError(f"{where}: this is no prompt", expected=expected, found=line[:80])


def write_answers(path: str, rows: Sequence[PromptRow], answers: Sequence["Completion"]) -> None:
    """Each row with what was generated, one JSON object a line; all of them or nothing."""
    lines: list[str] = []
    for row, answer in zip(rows, answers, strict=True):
        record = {name: value for name, value in asdict(answer).items() if value is not None}
        lines.append(json.dumps({**row.given, **record}, ensure_ascii=False) + "\n")
    write_atomically(path, "".join(lines).encode())
