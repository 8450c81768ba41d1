"""The figures of the published comparison: memory, speed against the roofline, accuracy by rank."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from fabric_jax.report.document import Picture
from fabric_jax.report.plot import COLOURS, MARKERS, new_figure, to_svg
from fabric_jax.report.published import PUBLISHED_POSITIONS, SIZES, published
from fabric_jax.report.records_index import Index, device_name
from fabric_jax.report.tables import best_epoch
from fabric_jax.sweeps.records import Record

# Two-sided 95 % quantiles of Student's t by degrees of freedom; 1.96 beyond.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
CATEGORIES = (
    *("linears", "embedding and head", "norms", "adapters", "optimizer"),
    "activations and gradients",
)


def memory_picture(index: Index) -> Picture | None:
    """Bars of categories for the ternary sizes in three recipes, with the published figure."""
    platforms = [p for p in index.platforms("vram") if _stacks(index, p)]
    if not platforms:
        return None
    platform = platforms[0]
    found = _stacks(index, platform)
    recipes = [r for r in ("seed", "ours", "smallest") if any((m, r) in found for m in SIZES)]
    models = [m for m in SIZES if any((m, r) in found for r in recipes)]
    figure, (axes,) = new_figure(7.2, 4.0)
    width = 0.8 / len(recipes)
    for i, model in enumerate(models):
        for j, recipe in enumerate(recipes):
            record = found.get((model, recipe))
            if record is not None:
                at = i + (j - (len(recipes) - 1) / 2) * width
                _stack(axes, at, width * 0.92, record)
        printed = published()["vram_mib"][model]["ternary2"]
        axes.hlines(printed / 1024, i - 0.42, i + 0.42, colors="black", linewidths=1.4)
    axes.set_xticks(range(len(models)), [m.removeprefix("bitnet-") for m in models])
    axes.set_ylabel("GiB")
    axes.grid(axis="x", visible=False)
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Patch(color=colour, label=name)
        for name, colour in zip(CATEGORIES, COLOURS, strict=False)
        if name != "norms"
    ]
    handles.append(Line2D([], [], color="black", label="published, TQ2_0"))
    axes.legend(handles=handles, loc="upper left")
    return Picture(
        name="memory",
        svg=to_svg(figure),
        caption="Memory of a LoRA step by category, as the compiler plans it, 2-bit weights, on "
        f"{platform} ({device_name(found.values())}). From left to right in each group: recipe "
        f"{', '.join(recipes)}. Black: the published figure.",
    )


def _stacks(index: Index, platform: str) -> dict[tuple[str, str], Record]:
    return {
        (record.cell["model"], record.cell["recipe"]): record
        for record in reversed(index.comparable("vram", platform, weights="ternary2"))
        if record.status == "ok" and "category_bytes" in record.metrics
    }


def _stack(axes: Any, at: float, width: float, record: Record) -> None:
    bottom = 0.0
    for category, colour in zip(CATEGORIES, COLOURS, strict=False):
        height = record.metrics["category_bytes"].get(category, 0) / 2**30
        axes.bar(at, height, width, bottom=bottom, color=colour)
        bottom += height


def speed_picture(index: Index) -> Picture | None:
    """Positions a second against parameters, with the roof that each device sets."""
    platforms = [
        p
        for p in index.platforms("finetune_throughput")
        if any(r.kind == "run" for r in index.find("finetune_throughput", p))
    ]
    if not platforms:
        return None
    figure, (axes,) = new_figure(7.2, 4.0)
    sizes = [
        float(m.removeprefix("bitnet-")[:-1]) * (1 if m.endswith("b") else 1e-3) for m in SIZES
    ]
    theirs = published()["epoch_seconds"]["ternary2"]
    printed = [PUBLISHED_POSITIONS / theirs[m]["nvidia_rtx4090"] for m in SIZES]
    axes.plot(sizes, printed, "x--", color="black", label="published, RTX 4090", linewidth=0.9)
    phone = [PUBLISHED_POSITIONS / theirs[m]["iphone16_gpu"] for m in SIZES]
    axes.plot(sizes, phone, "+:", color="#555555", label="published, iPhone 16", linewidth=0.9)
    numbered = enumerate((p, s) for p in platforms for s in ("published", "current"))
    for i, (platform, shape) in numbered:
        points = [
            (size, record.metrics)
            for size, model in zip(sizes, SIZES, strict=True)
            if (record := best_epoch(index, platform, model, shape)) is not None
            and record.status == "ok"
        ]
        if not points:
            continue
        label = f"{platform}, {'1 × 128 padded' if shape == 'published' else '16 × 512 packed'}"
        xs = [size for size, _ in points]
        ys = [m["positions"] / m["epoch_steps"] / m["step_seconds"] for _, m in points]
        roof = [m["positions"] / m["epoch_steps"] / m["roofline_seconds"] for _, m in points]
        colour, marker = COLOURS[i], MARKERS[i]
        axes.plot(xs, ys, marker, color=colour, label=label)
        axes.plot(xs, roof, "_" if len(xs) == 1 else "-", color=colour, alpha=0.55, linewidth=1.2)
    axes.set(xscale="log", yscale="log", xlabel="size of the model", ylabel="positions a second")
    axes.set_xticks(sizes, [m.removeprefix("bitnet-").rstrip("b") for m in SIZES], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xticklabels([m.removeprefix("bitnet-") for m in SIZES], rotation=30)
    axes.legend(fontsize=8)
    return Picture(
        name="speed",
        svg=to_svg(figure),
        caption="Speed of LoRA fine-tuning. Markers: measured; lines of the same colour: the roof "
        "that operations and bytes of a step set at peaks measured in the same process; black and "
        "grey: published, padding counted as it is in ours.",
    )


def rank_records(index: Index) -> list[Record]:
    """Accuracies by rank, targets and seed; of each platform those with its newest settings."""
    varied = ("rank", "targets", "seed")
    found: list[Record] = []
    for platform in index.platforms("biomed"):
        well = [r for r in index.find("biomed", platform) if r.metrics.get("accuracy") is not None]
        settings = [{k: v for k, v in r.cell.items() if k not in varied} for r in well]
        found += [r for r, own in zip(well, settings, strict=True) if own == settings[0]]
    return found


def rank_picture(index: Index) -> Picture | None:
    """Accuracy against rank: means over seeds with 95 % intervals, and the published points."""
    records = rank_records(index)
    groups: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    several = len({record.platform for record in records}) > 1
    for record in records:
        name = "+".join(record.cell["targets"]) + (f", {record.platform}" if several else "")
        groups[name][record.cell["rank"]].append(record.metrics["accuracy"])
    if not groups:
        return None
    figure, (axes,) = new_figure(6.4, 3.4)
    for i, (name, ranks) in enumerate(sorted(groups.items())):
        xs = sorted(ranks)
        means = [100 * statistics.fmean(ranks[x]) for x in xs]
        errors = [100 * interval(ranks[x]) for x in xs]
        axes.errorbar(
            [x * (1 + 0.03 * i) for x in xs],
            means,
            errors,
            fmt=f"{MARKERS[i % len(MARKERS)]}-",
            color=COLOURS[i % len(COLOURS)],
            capsize=2.5,
            linewidth=1,
            label=f"ours, {name}",
        )
    printed = published()["biomed_rank_accuracy"]
    axes.plot(
        [int(r) for r in printed],
        [100 * v for v in printed.values()],
        "x--",
        color="#777777",
        linewidth=0.9,
        label="published, Qwen3-1.7B, 33 questions",
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks([4, 8, 16, 32, 64, 128], ["4", "8", "16", "32", "64", "128"])
    axes.set(xlabel="LoRA rank", ylabel="accuracy, %", ylim=(0, 104))
    axes.legend(fontsize=8)
    sample = records[0]
    return Picture(
        name="rank",
        svg=to_svg(figure),
        caption=f"Accuracy against rank; {sample.metrics['questions']} held-out questions, "
        "mean and 95 % interval over seeds (Student's t). Chance is 33 %.",
    )


def interval(values: Sequence[float]) -> float:
    """Half of the 95 % interval of a mean; 0 for one value."""
    count = len(values)
    if count < 2:
        return 0.0
    factor = STUDENT[count - 2] if count - 2 < len(STUDENT) else 1.96
    return factor * statistics.stdev(values) / math.sqrt(count)
