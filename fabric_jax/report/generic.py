"""Table and figure of any experiment, from what its records say of themselves."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

from fabric_jax.report.document import Block, Heading, Picture, Table, Text, Value
from fabric_jax.report.figures import interval
from fabric_jax.report.plot import COLOURS, MARKERS, new_figure, to_svg
from fabric_jax.report.records_index import FAILED, Index, device_name, short, title
from fabric_jax.report.seeds import seed_blocks
from fabric_jax.sweeps.cells import describe
from fabric_jax.sweeps.records import Record

MOST_COLUMNS = 7
FEW_TICKS = 9


def experiment_section(index: Index, experiment: str) -> list[Block]:
    """Heading, question, means over seeds where there are several, all cells, figure."""
    records = _in_order(index.find(experiment))
    means = seed_blocks(experiment, records, _varying(records), _metrics(records), _setting)
    blocks: list[Block] = [
        Heading(text=experiment, level=3),
        Text(text=f"{records[0].question} ({device_name(records)})"),
        *_shared(records),
        *means,
        _table(records),
    ]
    drawn = any(isinstance(block, Picture) for block in means)
    picture = None if drawn else _picture(experiment, records)
    return blocks if picture is None else [*blocks, picture]


def _shared(records: Sequence[Record]) -> list[Block]:
    """The settings that all cells have alike, without which figures say little."""
    # What a platform made of a setting goes first.
    made = [record.cell | record.metrics.get("settings", {}) for record in records]
    first = {name: made[0][name] for name in records[0].cell}
    same = [name for name in first if all(own.get(name) == first[name] for own in made)]
    told = describe(first, [name for name in same if first[name] not in ("", None)])
    return [Text(text=f"In every cell: {told}.", small=True)] if told else []


def _in_order(records: Sequence[Record]) -> list[Record]:
    """By platform, then by each setting: numbers by size, names as they were first measured."""
    ordered = sorted(records, key=lambda record: (record.platform, record.started))
    names = _varying(ordered)
    seen = {n: list(dict.fromkeys(repr(record.cell.get(n)) for record in ordered)) for n in names}

    def place(record: Record, name: str) -> float:
        value = record.cell.get(name)
        if isinstance(value, int | float):
            return float(value)
        return float(seen[name].index(repr(value)))

    return sorted(ordered, key=lambda r: (r.platform, *(place(r, name) for name in names)))


def _table(records: Sequence[Record]) -> Table:
    settings = _varying(records)
    metrics = _metrics(records)
    platforms = len({record.platform for record in records}) > 1
    kinds = {record.kind for record in records} != {"run"}
    names = [*(["platform"] if platforms else []), *settings]
    rows: list[tuple[Value, ...]] = []
    for record in records:
        told = ([record.platform] if platforms else []) + [
            _setting(record.cell.get(name)) for name in settings
        ]
        row = [Value(text, record.digest if i == 0 else "") for i, text in enumerate(told)]
        if kinds:
            row.append(Value(record.kind))
        if record.status != "ok":
            failed = Value(FAILED[record.status], record.digest, "bad")
            row += [failed, *(Value("") for _ in metrics[1:])]
        else:
            values = ((name, record.metrics.get(name)) for name in metrics)
            row += [Value(short(value, name)) for name, value in values]
        rows.append(tuple(row))
    columns = (*names, *(["kind"] if kinds else []), *map(title, metrics or ["status"]))
    rows = [row if len(row) == len(columns) else (*row, Value("ok")) for row in rows]
    return Table(columns=columns, rows=rows, left=len(names) + kinds)


def _metrics(records: Sequence[Record]) -> list[str]:
    """Those that the experiment names, else the first that are plain numbers."""
    named = next((record.columns for record in records if record.columns), [])
    have = [name for r in records for name, v in r.metrics.items() if isinstance(v, int | float)]
    known = list(dict.fromkeys(have))
    # Times of cells that ran beside one another are null.
    there = {name for r in records for name, value in r.metrics.items() if value is not None}
    return [name for name in named if name in there] or known[:MOST_COLUMNS]


def _varying(records: Sequence[Record]) -> list[str]:
    """Settings that tell the records apart; a path only where nothing else does."""
    values = {n: [repr(record.cell.get(n)) for record in records] for n in records[0].cell}
    varying = [name for name, own in values.items() if len(set(own)) > 1]

    def said(name: str) -> bool:
        others = (values[n] for n in varying if n != name)
        return "/" in "".join(values[name]) and any(
            len(set(zip(other, values[name], strict=True))) == len(set(other)) for other in others
        )

    # Of two paths that say the same the first is kept.
    for name in reversed(varying):
        if said(name):
            varying.remove(name)
    return varying or list(values)[:1]


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, cast(list[Any], value)))
    return "–" if value is None else str(value)


def _value(record: Record, name: str) -> Any:
    value = record.cell.get(name, record.metrics.get(name))
    return _setting(value) if isinstance(value, list | bool) else value


def _picture(experiment: str, records: Sequence[Record]) -> Picture | None:
    """As the experiment's ``FIGURE`` asks; means over whatever it doesn't name."""
    asked = next((record.figure for record in records if record.figure), None)
    if asked is None or asked["kind"] == "stack":
        return None
    x, y, series = asked["x"], asked["y"], asked["series"]
    groups: dict[str, dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    platforms = len({record.platform for record in records}) > 1
    for record in records:
        where, what = _value(record, x), record.metrics.get(y)
        if record.status != "ok" or where is None or not isinstance(what, int | float):
            continue
        name = str(_value(record, series)) if series else ""
        name = f"{record.platform} {name}".strip() if platforms else name
        groups[name][where].append(float(what))
    if not groups:
        return None
    figure, (axes,) = new_figure(6.4, 3.4)
    draw = _bars if asked["kind"] == "bar" else _lines
    draw(axes, groups)
    places = sorted({x for points in groups.values() for x in points}, key=str)
    numbers = all(isinstance(place, int | float) for place in places)
    if numbers and "x" in asked["log"] and asked["kind"] != "bar":
        axes.set_xscale("log")
        if len(places) <= FEW_TICKS:
            axes.set_xticks(places, [f"{x:g}" for x in places])
            axes.minorticks_off()
    if y.endswith("accuracy"):
        axes.set_ylim(0, 1.04)
    if "y" in asked["log"]:
        axes.set_yscale("log")
    elif min(value for group in groups.values() for own in group.values() for value in own) >= 0:
        # Intervals of few seeds reach beyond what can be.
        axes.set_ylim(bottom=0)
    axes.set_ylabel(title(y))
    axes.set_xlabel(title(x))
    if any(groups):
        named = {"title": title(series) if series else None, "fontsize": 8}
        if asked["kind"] == "bar":
            # Bars leave no room.
            figure.legend(loc="outside upper center", ncols=min(4, len(groups)), **named)
        else:
            axes.legend(**named)
    unit = {"_seconds": ", s", "_bytes": ", bytes"}
    axes.set_ylabel(title(y) + next((u for k, u in unit.items() if y.endswith(k)), ""))
    return Picture(
        name=experiment.replace(".", "-"),
        svg=to_svg(figure),
        caption=f"{title(y)} by {title(x)}.{_means(groups)}",
    )


def _means(groups: dict[str, dict[Any, list[float]]]) -> str:
    """What a caption says of how many cells each mean is of; nothing where none is of several."""
    counts = sorted({len(values) for group in groups.values() for values in group.values()})
    of = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    return f" Means of {of} with 95 % intervals." if counts[-1] > 1 else ""


def _lines(axes: Any, groups: dict[str, dict[Any, list[float]]]) -> None:
    for i, (name, points) in enumerate(sorted(groups.items())):
        xs = sorted(points)
        axes.errorbar(
            xs,
            [statistics.fmean(points[x]) for x in xs],
            [interval(points[x]) for x in xs],
            fmt=f"{MARKERS[i % len(MARKERS)]}-",
            color=COLOURS[i % len(COLOURS)],
            capsize=2.5,
            linewidth=1,
            label=name or None,
        )


def _bars(axes: Any, groups: dict[str, dict[Any, list[float]]]) -> None:
    names = list(dict.fromkeys(str(x) for points in groups.values() for x in points))
    width = 0.8 / len(groups)
    for i, (label, points) in enumerate(sorted(groups.items())):
        by_name = {str(x): values for x, values in points.items()}
        at = [j + (i - (len(groups) - 1) / 2) * width for j, n in enumerate(names) if n in by_name]
        own = [by_name[n] for n in names if n in by_name]
        axes.bar(
            at,
            [statistics.fmean(values) for values in own],
            width * 0.92,
            yerr=[interval(values) for values in own],
            color=COLOURS[i % len(COLOURS)],
            capsize=2.5,
            label=label or None,
        )
    crowded = max(map(len, names)) > 8 and len(names) > 5
    axes.set_xticks(range(len(names)), names, rotation=25 if crowded else 0)
    axes.grid(axis="x", visible=False)
