"""The records at the end of the page: what those of a sweep share is said once."""

import json
from collections import Counter
from collections.abc import Sequence
from html import escape
from itertools import groupby
from typing import Any

from fabric_jax.report.records_index import FAILED, Index, device_name
from fabric_jax.sweeps.records import Record

# The summary names it, its sweep's heading says what it asks, the rest is said elsewhere.
ELSEWHERE = (
    *("schema", "digest", "experiment", "question", "name", "platform", "kind", "status"),
    *("command", "cell", "figure", "columns", "device", "environment", "started", "seconds"),
    *("metrics", "code"),
)


def records_html(index: Index) -> str:
    """Machines first, then every record under the experiment and platform that it is of."""
    devices = {_machine(record): device_name([record]) for record in index.records}
    numbers = {device: i for i, device in enumerate(sorted(devices), 1)}
    parts = [_device(text, devices[text], number) for text, number in numbers.items()]
    ordered = sorted(index.records, key=lambda r: (r.experiment, r.platform, r.name))
    for (experiment, platform), group in groupby(ordered, lambda r: (r.experiment, r.platform)):
        parts.append(f"<h3>{escaped(f'{experiment} on {platform}')}</h3>")
        parts.append(_sweep(list(group), numbers))
    return "\n".join(parts)


def escaped(text: str) -> str:
    """As a page can hold it; a number is not torn from its per cent."""
    return escape(text, quote=False).replace(" %", "&nbsp;%")


def _machine(record: Record) -> str:
    return _json(record.device)


def _device(text: str, name: str, number: int) -> str:
    summary = escaped(f"device {number}: {name}")
    return (
        f'<details class="record" id="device-{number}"><summary>{summary}</summary>'
        f"<pre>{escape(text, quote=False)}</pre></details>"
    )


def _sweep(records: Sequence[Record], numbers: dict[str, int]) -> str:
    """What the records of a sweep share, and each of them."""
    tables = [_tables(record) for record in records]
    same = {name: _same([table[name] for table in tables]) for name in tables[0]}
    commands = Counter(_command_without_name(record) for record in records)
    command = commands.most_common(1)[0][0]
    said = [f"Made again, one by one, by <code>{escaped(command)}</code> and the record's name."]
    for name, shared in same.items():
        if shared:
            said.append(f"Every record's {name}: <code>{escaped(_json(shared))}</code>")
    heading = f'<p class="small">{" ".join(said)}</p>'
    lines = [
        _record(
            record,
            {name: _rest(table[name], same[name]) for name in table},
            made=_made(record, command, numbers[_machine(record)]),
        )
        for record, table in zip(records, tables, strict=True)
    ]
    return "\n".join([heading, *lines])


def _tables(record: Record) -> dict[str, dict[str, Any]]:
    """What records of a sweep may share, entry by entry."""
    return {
        "cell": record.cell,
        "environment": record.environment,
        "metrics": record.metrics,
        "sources": {"code": record.code},
    }


def _same(tables: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The entries that all tables have, where there is more than one."""
    first = tables[0] if len(tables) > 1 else {}
    return {k: v for k, v in first.items() if all(k in one and one[k] == v for one in tables)}


def _rest(table: dict[str, Any], same: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key not in same}


def _command_without_name(record: Record) -> str:
    return record.command.removesuffix(record.name).rstrip()


def _made(record: Record, command: str, device: int) -> str:
    """When and where, and by which command if it is not that of the sweep."""
    text = f"{record.started}, {record.seconds:g} s on "
    text += f'<a href="#device-{device}">device {device}</a>'
    if _command_without_name(record) != command:
        return f"<code>{escaped(record.command)}</code> {text}"
    return text


def _record(record: Record, own: dict[str, dict[str, Any]], *, made: str) -> str:
    status = record.kind if record.status == "ok" else FAILED[record.status]
    told = {key: value for key, value in own.items() if value}
    told |= {
        key: value
        for key, value in record.to_json().items()
        if key not in ELSEWHERE and value is not None
    }
    body = escape("\n".join(f"{key}: {_json(value)}" for key, value in told.items()), quote=False)
    return (
        f'<details class="record" id="r-{record.digest}"><summary>{escaped(record.name)} '
        f"({status})</summary><p>{made}</p><pre>{body}</pre></details>"
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(", ", ":"))
