"""Files of prompts, and the answers to them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fabric_jax.errors import FabricError
from fabric_jax.files import write_atomically

if TYPE_CHECKING:
    from fabric_jax.generation.prompts import Prompt
    from fabric_jax.model import Completion


OF_ROWS = (".jsonl", ".ndjson", ".json")
"""Names of files that hold rows; others hold a prompt a line."""


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
    """The rows of a file of JSON, read as training data is, or the lines of any other.

    Raises:
        FabricError: the file can't be read, holds no prompt, or a row is malformed; names it.
    """
    file = Path(path).expanduser()
    if file.suffix in OF_ROWS and file.is_file():
        from fabric_jax.data.sources import read_records

        return [_row(record.where, record.values) for record in read_records(path, split="")]
    try:
        # Lines end where an editor ends them: texts may hold what ``splitlines`` takes for an end.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise FabricError(f"cannot read the prompts {path}: {error}") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise FabricError(f"{path} holds no prompt")
    return [PromptRow(prompt=line, adapter=None, given={"prompt": line}) for line in prompts]


def _row(where: str, row: Mapping[str, Any]) -> PromptRow:
    prompt, messages, adapter = row.get("prompt"), row.get("messages"), row.get("adapter")
    if not isinstance(adapter, str | None):
        raise FabricError(f"{where}: the adapter is a name", found=repr(adapter)[:80])
    if isinstance(prompt, str) and messages is None:
        return PromptRow(prompt=prompt, adapter=adapter, given=dict(row))
    if prompt is None and isinstance(messages, list) and messages:
        turns = cast(list[Any], messages)
        if all(isinstance(turn, dict) for turn in turns):
            return PromptRow(prompt=turns, adapter=adapter, given=dict(row))
    raise FabricError(
        f"{where}: this is no prompt",
        expected='an object with "prompt" (a text) or "messages" (a list of objects)',
        found=repr(row)[:80],
    )


def write_answers(path: str, rows: Sequence[PromptRow], answers: Sequence["Completion"]) -> None:
    """Each row with what was generated, one JSON object a line; all of them or nothing."""
    lines: list[str] = []
    for row, answer in zip(rows, answers, strict=True):
        record = {name: value for name, value in asdict(answer).items() if value is not None}
        lines.append(json.dumps({**row.given, **record}, ensure_ascii=False) + "\n")
    # Half of a surrogate pair, which a row may hold, is written as JSON escapes it.
    write_atomically(path, "".join(lines).encode(errors="backslashreplace"))
