"""The biomedical set: an epoch of the smallest model, warm and with compiling apart; accuracy."""

import statistics
from collections import defaultdict
from collections.abc import Sequence

from fabric_jax.report.document import Block, Heading, Table, Text, Value
from fabric_jax.report.figures import interval, rank_records
from fabric_jax.report.published import published
from fabric_jax.report.records_index import (
    Index,
    device_name,
    figure_of,
    is_whole,
    mib,
    short,
)
from fabric_jax.sweeps.records import Record

SMALLEST = "bitnet-125m"


def smallest_epochs(index: Index) -> list[Record]:
    """Epochs of the smallest model that ran, by platform, fastest first."""
    return [
        record
        for platform in index.platforms("finetune_throughput")
        for record in sorted(
            (
                record
                for record in index.comparable("finetune_throughput", platform, model=SMALLEST)
                if record.status == "ok" and record.kind == "run"
            ),
            key=lambda record: record.metrics["epoch_seconds"],
        )
    ]


def smallest_epoch_blocks(index: Index) -> list[Block]:
    """One line a way of putting the 264 rows into steps, compiling apart from the warm epoch."""
    records = smallest_epochs(index)
    if not records:
        return []
    theirs = published()["epoch_seconds"]["ternary2"][SMALLEST]
    fastest: dict[str, Record] = {}
    for record in records:
        fastest.setdefault(record.platform, record)
    sentences = [_warm(record) for record in fastest.values()]
    rows = [_epoch_row(record) for record in records]
    columns = (
        *("platform", "rows a step", "steps", "run", "epoch, s", "compiling, s", "step"),
        *("trainable tokens/s", "positions/s", "of roofline", "peak, MiB"),
    )
    return [
        Heading(text=f"One epoch of the 264 biomedical rows, {SMALLEST}", level=3),
        Text(
            text=f"Published: {theirs['nvidia_rtx4090']} s on an RTX 4090, "
            f"{theirs['s25_adreno_gpu']} s on a Galaxy S25. {' '.join(sentences)}"
        ),
        Table(columns=columns, rows=rows),
        Text(
            text="Epoch: all steps after compiling; where fewer ran, their median times the number "
            "of steps. Compiling is short where an earlier cell left its program in the cache. "
            "Packed: several documents a row, which attention and loss keep apart. Tokens are "
            "random, in rows of the published lengths, so nothing is learnt here.",
            small=True,
        ),
    ]


def _warm(record: Record) -> str:
    metrics = record.metrics
    part = "" if is_whole(record) else f" ({metrics['steps_run']} steps of it ran)"
    return (
        f"On {record.platform} ({device_name([record])}) the fastest takes "
        f"{seconds(metrics['epoch_seconds'])} s once its program is there{part}, and making the "
        f"program {seconds(metrics['compile_seconds'])} s."
    )


def shape_of(record: Record) -> str:
    """``8 × 128 packed``: rows and positions of a step."""
    cell = record.cell
    packed = "packed" if cell["packing"] else "padded"
    return f"{cell['rows']} × {cell['length']} {packed}"


def _epoch_row(record: Record) -> tuple[Value, ...]:
    metrics = record.metrics
    return (
        Value(record.platform),
        Value(shape_of(record), record.digest),
        Value(f"{metrics['epoch_steps']:,}"),
        Value("all" if is_whole(record) else f"{metrics['steps_run']:,}"),
        figure_of(record, ("epoch_seconds",), seconds),
        figure_of(record, ("compile_seconds",), seconds),
        figure_of(record, ("step_seconds",), lambda value: short(value, "step_seconds")),
        figure_of(record, ("trainable_tokens_per_second",), short),
        figure_of(record, ("positions_per_second",), short),
        figure_of(record, ("of_roofline",), lambda share: f"{100 * share:.0f} %"),
        figure_of(record, ("peak_bytes",), mib),
    )


def accuracy_blocks(index: Index) -> list[Block]:
    """Published accuracy by rank beside ours, means over seeds with 95 % intervals."""
    groups: dict[tuple[str, str, int], list[Record]] = defaultdict(list)
    for record in rank_records(index):
        targets = "+".join(record.cell["targets"])
        groups[record.platform, targets, record.cell["rank"]].append(record)
    if not groups:
        return []
    printed = published()["biomed_rank_accuracy"]
    order = {platform: i for i, platform in enumerate(index.platforms("biomed"))}
    rows = [
        (
            Value(platform),
            Value(targets),
            Value(str(rank)),
            Value(_percent([printed[str(rank)]]) if targets == "all" else "–"),
            *_means(groups[platform, targets, rank]),
        )
        for platform, targets, rank in sorted(groups, key=lambda key: (order[key[0]], *key[1:]))
    ]
    columns = (
        *("platform", "targets", "rank", "published, %", "ours, %", "seeds"),
        *("lowest and highest", "held-out loss", "trained parameters"),
    )
    sample = next(iter(groups.values()))[0]
    model, questions = sample.cell["model"], sample.metrics["questions"]
    return [
        Text(
            text=f"Ours: {model} ({', '.join(device_name(index.find('biomed', p)) for p in order)})"
            f", {questions} held-out questions; mean over seeds ± 95 % interval (Student's t)."
        ),
        Table(columns=columns, rows=rows, left=2),
    ]


def _means(records: Sequence[Record]) -> tuple[Value, ...]:
    found = [record.metrics["accuracy"] for record in records]
    digest = records[0].digest
    losses = [r.metrics["eval_loss"] for r in records if r.metrics.get("eval_loss") is not None]
    return (
        Value(_percent(found), digest),
        Value(str(len(found))),
        Value(f"{100 * min(found):.1f} – {100 * max(found):.1f}"),
        Value(f"{statistics.fmean(losses):.4f}" if losses else "–"),
        Value(f"{records[0].metrics.get('trained_parameters', 0):,}"),
    )


def _percent(values: Sequence[float]) -> str:
    mean = 100 * statistics.fmean(values)
    return f"{mean:.1f}" if len(values) < 2 else f"{mean:.1f} ± {100 * interval(values):.1f}"


def seconds(value: float) -> str:
    """Two digits after the point below 100."""
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
