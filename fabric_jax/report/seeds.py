"""What experiments say once their seeds are taken together: means, errors, differences to a base.

Records that differ in nothing but ``seed`` are one group. Differences are paired: of two groups,
seed by seed, so that what a seed does to both of them cancels.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fabric_jax.report.document import Block, Picture, Table, Text, Value
from fabric_jax.report.plot import COLOURS, new_figure, to_svg
from fabric_jax.report.records_index import short, title
from fabric_jax.sweeps.records import Record

SEED = "seed"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Records of one cell with several seeds.

    Attributes:
        platform: of all of them.
        cell: their settings, without the seed.
        records: by seed.
    """

    platform: str
    cell: dict[str, Any]
    records: dict[Any, Record]

    def values(self, metric: str) -> dict[Any, float]:
        """The metric by seed, where it is a number."""
        found = {seed: record.metrics.get(metric) for seed, record in self.records.items()}
        return {seed: value for seed, value in found.items() if isinstance(value, int | float)}


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean with its standard error, which is None for one value."""

    value: float
    error: float | None
    count: int


def groups_of(records: Sequence[Record]) -> list[Group]:
    """Those of the records that went well, in the records' order."""
    found: dict[str, Group] = {}
    for record in records:
        if record.status != "ok" or SEED not in record.cell:
            continue
        cell = {name: value for name, value in record.cell.items() if name != SEED}
        own = Group(platform=record.platform, cell=cell, records={})
        group = found.setdefault(f"{record.platform} {cell!r}", own)
        group.records[record.cell[SEED]] = record
    return list(found.values())


def mean_of(values: Sequence[float]) -> Mean:
    """The mean and ``s / sqrt(n)``, s the sample's standard deviation."""
    count = len(values)
    error = statistics.stdev(values) / math.sqrt(count) if count > 1 else None
    return Mean(value=statistics.fmean(values), error=error, count=count)


def difference(group: Group, base: Group, metric: str) -> Mean | None:
    """Of the metric, paired by seed; None where they have no seed in common."""
    own, other = group.values(metric), base.values(metric)
    paired = [own[seed] - other[seed] for seed in own if seed in other]
    return mean_of(paired) if paired else None


def base_of(group: Group, groups: Sequence[Group], figure: dict[str, str] | None) -> Group | None:
    """The group that another one is compared with: its settings, but the baseline's value."""
    x, baseline = (figure or {}).get("x", ""), (figure or {}).get("baseline", "")
    if not baseline:
        return None
    wanted = group.cell | {x: baseline}
    same = (g for g in groups if g.platform == group.platform and g.cell == wanted)
    return next(same, None)


def seed_blocks(
    experiment: str,
    records: Sequence[Record],
    settings: Sequence[str],
    metrics: Sequence[str],
    show: Callable[[Any], str],
) -> list[Block]:
    """A table of means over seeds, and a figure where differences to a baseline are asked for.

    Args:
        experiment: its name, for that of the figure's file.
        records: of the experiment.
        settings: that vary.
        metrics: that tables show, the first being what differences are of where no figure says.
        show: a setting as text.

    Returns:
        Nothing where no two records differ in the seed alone and nothing is compared.
    """
    groups = groups_of(records)
    figure = next((record.figure for record in records if record.figure), None)
    bases = [base_of(group, groups, figure) for group in groups]
    several = max((len(group.records) for group in groups), default=0) > 1
    if not metrics or not (several or any(bases)):
        return []
    compared = (figure or {}).get("y") or metrics[0]
    names = [name for name in settings if name != SEED]
    platforms = len({group.platform for group in groups}) > 1
    if any(bases):
        groups, bases = _best_first(groups, bases, compared)
    rows: list[tuple[Value, ...]] = []
    for group, base in zip(groups, bases, strict=True):
        own = [show(group.cell.get(name)) for name in names]
        told = [group.platform, *own] if platforms else own
        row = [*told, str(len(group.records)), *(_mean_text(group, name) for name in metrics)]
        if any(bases):
            row.append(_difference_text(group, base, compared))
        rows.append(tuple(Value(text) for text in row))
    columns = [*(["platform"] if platforms else []), *names, "seeds", *map(title, metrics)]
    notes = "Means over seeds ± standard error."
    if any(bases):
        columns.append(f"{title(compared)} − baseline")
        notes += f" Differences to {(figure or {})['baseline']} are paired by seed."
    left = len(names) + platforms
    blocks: list[Block] = [Table(columns=tuple(columns), rows=rows, left=left)]
    blocks.append(Text(text=f"{notes} Single runs follow.", small=True))
    if any(bases) and figure is not None:
        blocks.insert(0, difference_picture(experiment, groups, bases, figure, show))
    return blocks


def difference_picture(
    experiment: str,
    groups: Sequence[Group],
    bases: Sequence[Group | None],
    figure: dict[str, str],
    show: Callable[[Any], str],
) -> Picture:
    """Bars of differences to the baseline with standard errors, each seed a dot."""
    x, y, baseline = figure["x"], figure["y"], figure["baseline"]
    platforms = list(dict.fromkeys(group.platform for group in groups))
    drawing, panels = new_figure(6.4, 0.9 + 0.3 * len(groups) / len(platforms), len(platforms))
    for axes, platform in zip(panels, platforms, strict=True):
        pairs = [(g, b) for g, b in zip(groups, bases, strict=True) if g.platform == platform]
        drawn = [(g, b) for g, b in pairs if b is not None and g is not b and difference(g, b, y)]
        for place, (group, base) in enumerate(drawn):
            own, other = group.values(y), base.values(y)
            points = [own[seed] - other[seed] for seed in own if seed in other]
            mean = mean_of(points)
            colour = COLOURS[4] if mean.value > 0 else COLOURS[0]
            axes.barh(place, mean.value, 0.62, color=colour, alpha=0.55)
            axes.errorbar(mean.value, place, xerr=mean.error or 0, color="black", capsize=3)
            axes.plot(points, [place] * len(points), "o", color=colour, markersize=3)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(drawn)), [show(group.cell.get(x)) for group, _ in drawn])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"{title(y)}, difference to {baseline}")
        if len(platforms) > 1:
            axes.set_title(platform, fontsize=9)
    count = max(len(group.records) for group in groups)
    return Picture(
        name=experiment.replace(".", "-"),
        svg=to_svg(drawing),
        caption=f"{title(y)} by {title(x)}, less than {baseline} to the left. Bars are means of "
        f"differences paired by {count} seeds, whiskers standard errors, dots single seeds.",
    )


def _best_first(
    groups: list[Group], bases: list[Group | None], metric: str
) -> tuple[list[Group], list[Group | None]]:
    """Both in the order of the metric's mean, groups without it last."""

    def key(pair: tuple[Group, Group | None]) -> tuple[str, float]:
        values = list(pair[0].values(metric).values())
        return pair[0].platform, statistics.fmean(values) if values else math.inf

    ordered = sorted(zip(groups, bases, strict=True), key=key)
    return [group for group, _ in ordered], [base for _, base in ordered]


def _mean_text(group: Group, metric: str) -> str:
    values = list(group.values(metric).values())
    if not values:
        found = [record.metrics.get(metric) for record in group.records.values()]
        texts = {str(value) for value in found if value is not None}
        return ", ".join(sorted(texts)) or "–"
    if all(value == values[0] for value in values):
        return short(values[0], metric)
    mean = mean_of(values)
    return with_error(mean) if metric_is_plain(metric) else short(mean.value, metric)


def metric_is_plain(metric: str) -> bool:
    """Whether it is printed as a number, not as seconds or bytes."""
    return not metric.endswith(("_seconds", "_bytes", "_per_second"))


def _difference_text(group: Group, base: Group | None, metric: str) -> str:
    if base is None or group is base:
        return "–"
    found = difference(group, base, metric)
    return "–" if found is None else with_error(found, sign=True)


def with_error(mean: Mean, *, sign: bool = False) -> str:
    """``1.234 ± 0.005``: the error with one digit that counts, or two where it begins with 1."""
    plus = "+" if sign else ""
    if mean.error is None:
        return f"{mean.value:{plus}.4g}"
    if not mean.error:
        return f"{mean.value:{plus}.4g} ± 0"
    leading = math.floor(math.log10(mean.error))
    first = int(mean.error / 10**leading)
    digits = max(0, -leading + (first == 1))
    return f"{mean.value:{plus}.{digits}f} ± {mean.error:.{digits}f}"
