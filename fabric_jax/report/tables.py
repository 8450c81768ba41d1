"""The published tables beside ours."""

from collections.abc import Sequence

from fabric_jax.report.document import Block, Heading, Table, Text, Value
from fabric_jax.report.published import (
    DECODE_NOTE,
    EPOCH_NOTE,
    LOSSLESS_NOTE,
    SIZES,
    VRAM_NOTE,
    published,
)
from fabric_jax.report.records_index import (
    MEMORY,
    Index,
    device_name,
    figure_of,
    is_whole,
    mib,
    number,
    short,
)
from fabric_jax.sweeps.records import Record

GGUF = {
    "ternary1.6": "TQ1_0",
    "ternary2": "TQ2_0",
    "int4": "Q4",
    "int8": "Q8",
    "float16": "F16",
    "float32": "F32",
}
STARRED = "* as the compiler plans it; nothing ran."


def memory_tables(index: Index) -> list[Block]:
    """Published VRAM beside ours, a table a platform."""
    blocks: list[Block] = []
    for platform in index.platforms("vram"):
        rows = [
            row
            for model, formats in published()["vram_mib"].items()
            for weights, figure in formats.items()
            if (row := _memory_row(index, platform, model, weights, figure)) is not None
        ]
        if not rows:
            continue
        records = index.find("vram", platform)
        if all(record.kind == "lowered" for record in records):
            continue
        blocks += [
            Heading(text=f"Memory of LoRA fine-tuning on {platform}, MiB", level=3),
            Text(text=f"{_what(records)}. LoRA rank 8 on all linears, 1 × 128 positions."),
            Table(
                columns=(
                    *("model", "format", "published", "seed's recipe", "ratio"),
                    *("ours", "ratio", "smallest", "ratio"),
                ),
                rows=rows,
                left=2,
            ),
        ]
    if blocks:
        notes = f"{VRAM_NOTE} Ratio: published over ours, above 1 where ours takes less."
        recipes = (
            "Seed's recipe: nothing recomputed, all logits at once, float32 activations, adapters "
            "and moments, float16 embedding. Ours: layers recomputed and updated within the "
            "backward pass, bfloat16 activations on accelerators. Smallest: int8 embedding and "
            "moments too."
        )
        blocks += [Text(text=recipes, small=True), Text(text=f"{STARRED} {notes}", small=True)]
    return blocks


def _memory_row(
    index: Index, platform: str, model: str, weights: str, figure: float | None
) -> tuple[Value, ...] | None:
    found = {
        recipe: index.first("vram", platform, model=model, weights=weights, recipe=recipe)
        for recipe in ("seed", "ours", "smallest")
    }
    if figure is None or not any(found.values()):
        return None
    row = [Value(model), Value(GGUF[weights]), Value(f"{figure:,}")]
    for record in found.values():
        own = number(record, *MEMORY)
        ratio = "" if own is None else f"{figure * 2**20 / own:.2f}"
        row += [figure_of(record, MEMORY, mib), Value(ratio)]
    return tuple(row)


def epoch_tables(index: Index) -> list[Block]:
    """Published times an epoch beside ours."""
    blocks: list[Block] = []
    for platform in index.platforms("finetune_throughput"):
        rows = [row for model in SIZES if (row := _epoch_row(index, platform, model)) is not None]
        records = [r for r in index.find("finetune_throughput", platform) if r.kind == "run"]
        if not rows or not records:
            continue
        blocks += [
            Heading(text=f"One epoch of the 264 biomedical rows on {platform}", level=3),
            Text(text=f"{_what(records)}. One padded row of 128 positions a step, rank 8."),
            Table(
                columns=(
                    *("model", "RTX 4090, s", "Galaxy S25, s", "iPhone 16, s", "ours, s"),
                    *("4090 over ours", "step", "real tokens/s", "positions/s", "of roofline"),
                    *("packed, s", "16 × 512 packed, s"),
                ),
                rows=rows,
            ),
        ]
    if blocks:
        hardware = "; ".join(f"{name}: {facts}" for name, facts in published()["hardware"].items())
        blocks.append(
            Text(
                text=f"{EPOCH_NOTE} Published columns are TQ2_0's. Roofline: the least time that "
                "the step's operations and bytes need at peaks measured in the same process. "
                f"Hardware: {hardware}.",
                small=True,
            )
        )
    return blocks


def _epoch_row(index: Index, platform: str, model: str) -> tuple[Value, ...] | None:
    record = best_epoch(index, platform, model, "published")
    if record is None:
        return None
    theirs = published()["epoch_seconds"]["ternary2"][model]
    own = number(record, "epoch_seconds")
    ratio = "" if own is None else f"{theirs['nvidia_rtx4090'] / own:,.1f}"
    names = ("nvidia_rtx4090", "s25_adreno_gpu", "iphone16_gpu")
    return (
        Value(model),
        *(Value("–" if theirs[name] is None else f"{theirs[name]:,}") for name in names),
        _epoch(record),
        Value(ratio),
        figure_of(record, ("step_seconds",), lambda s: short(s, "step_seconds")),
        figure_of(record, ("real_tokens_per_second",), short),
        figure_of(record, ("positions_per_second",), short),
        figure_of(record, ("of_roofline",), lambda x: f"{100 * x:.0f} %"),
        *(_epoch(best_epoch(index, platform, model, shape)) for shape in ("packed", "current")),
    )


def _epoch(record: Record | None) -> Value:
    """Seconds an epoch, marked where not all of it ran."""

    def show(seconds: float) -> str:
        assert record is not None
        return f"{'' if is_whole(record) else '≈ '}{_seconds(seconds)}"

    return figure_of(record, ("epoch_seconds",), show)


def best_epoch(index: Index, platform: str, model: str, shape: str) -> Record | None:
    """The fastest record of an epoch that ran; a failure where none did."""
    found = index.comparable("finetune_throughput", platform, model=model, shape=shape)
    ran = [r for r in found if r.status == "ok" and r.kind == "run"]
    if ran:
        return min(ran, key=lambda record: record.metrics["epoch_seconds"])
    failed = [record for record in found if record.status != "ok"]
    return failed[0] if failed else None


def decode_tables(index: Index) -> list[Block]:
    """Published speeds of generation beside ours, batch 1."""
    blocks: list[Block] = []
    names = ("nvidia_rtx4090", "amd_1920x_llamacpp", "macos_m3")
    for platform in index.platforms("decode_throughput"):
        rows: list[tuple[Value, ...]] = []
        for model in SIZES:
            for packing in ("ternary1.6", "ternary2"):
                record = index.first("decode_throughput", platform, model=model, packing=packing)
                if record is None:
                    continue
                theirs = published()["decode_tokens_per_second"][packing][model]
                rows.append(
                    (
                        *(Value(model), Value(GGUF[packing])),
                        *(Value(f"{theirs[name]:,.1f}") for name in names),
                        figure_of(record, ("decode_tokens_per_second",), lambda x: f"{x:,.1f}"),
                        figure_of(record, ("first_token_seconds",), lambda x: short(x, "_seconds")),
                        figure_of(record, ("of_limit",), lambda x: f"{100 * x:.0f} %"),
                    )
                )
        if rows:
            devices = ("RTX 4090", "AMD 1920X", "Apple M3 Pro")
            columns = ("model", "format", *devices, "ours", "first token", "of memory's limit")
            records = index.comparable("decode_throughput", platform)
            settings = (record.metrics.get("settings", {}) for record in records)
            dtypes = sorted({own["dtype"] for own in settings if "dtype" in own})
            activations = f", activations in {' and '.join(dtypes)}" if dtypes else ""
            blocks += [
                Heading(text=f"Generation on {platform}, tokens a second", level=3),
                Text(text=f"{_what(records)}. Batch 1{activations}."),
                Table(columns=columns, rows=rows, left=2),
            ]
    return [*blocks, Text(text=DECODE_NOTE, small=True)] if blocks else []


def lossless_tables(index: Index) -> list[Block]:
    """Published divergence beside ours."""
    blocks: list[Block] = []
    names = ("kl_mean", "kl_p99", "kl_max", "top1_agreement", "perplexity_ratio")
    theirs = published()["lossless"]
    for platform in index.platforms("lossless"):
        records = [r for r in index.find("lossless", platform) if r.status == "ok"]
        for model in sorted({record.cell["model"] for record in records}):
            own = [record for record in records if record.cell["model"] == model]
            rows: list[tuple[Value, ...]] = [
                (Value("published, GPU against CPU"), *(Value(_exact(theirs[n])) for n in names)),
            ]
            rows += [
                (Value(lossless_variant(r), r.digest), *(figure_of(r, (n,), _exact) for n in names))
                for r in sorted(own, key=lossless_variant)
            ]
            of = f"{model}, {own[0].metrics['positions']:,} tokens"
            columns = ("variant", "mean KL", "99 % KL", "max KL", "same top token", "PPL ratio")
            blocks += [
                Heading(text=f"Divergence from the float32 reference on {platform}", level=3),
                Text(text=f"{_what(own)}. Model {of}."),
                Table(columns=columns, rows=rows),
            ]
    return [*blocks, Text(text=LOSSLESS_NOTE, small=True)] if blocks else []


def lossless_variant(record: Record) -> str:
    """What differs from plain float32 with packed weights."""
    cell = record.cell
    base = {"dtype": "float32", "embedding": "float32", "act_quant": "per_token"}
    words = {
        "dtype": "{} activations",
        "embedding": "{} embedding",
        "act_quant": "activations quantised {}",
    }
    changed = [words[k].format(cell[k]) for k, v in base.items() if cell[k] != v]
    if cell["implementation"] != "xla" and cell.get("sides") == "xla":
        changed.append("products alone")
    return ", ".join([cell["implementation"], cell["packing"], *changed])


def _seconds(seconds: float) -> str:
    return f"{seconds:,.2f}" if seconds < 100 else f"{seconds:,.0f}"


def _exact(value: float) -> str:
    return f"{value:.2e}" if abs(value) < 1e-2 else f"{value:.5f}"


def _what(records: Sequence[Record]) -> str:
    """Device and versions of records."""
    packages = [r.device.get("packages", {}) for r in records if r.device.get("packages")]
    versions = sorted({f"jax {p['jax']}" for p in packages if "jax" in p})
    kinds = sorted({r.kind for r in records})
    return f"{device_name(records)}; {', '.join(versions)}; {' and '.join(kinds)}"
