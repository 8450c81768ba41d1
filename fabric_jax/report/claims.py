"""The published claims, and what the records say of each."""

from collections.abc import Sequence

from fabric_jax.report.biomed import SMALLEST, seconds, shape_of, smallest_epochs
from fabric_jax.report.document import Tone, Value, Verdict
from fabric_jax.report.published import published
from fabric_jax.report.records_index import (
    MEMORY,
    Index,
    device_name,
    how,
    is_whole,
    mib,
    number,
    short,
)
from fabric_jax.report.tables import lossless_variant
from fabric_jax.sweeps.records import Record

PHONE_BYTES = 8 * 10**9
"""Main memory of the phone that the published system trains 13B on (iPhone 16: 8 GB)."""
WORDS: dict[Tone, str] = {
    "good": "holds",
    "mixed": "holds under these conditions",
    "bad": "does not hold",
    "none": "not measured",
}


def all_verdicts(index: Index) -> list[Verdict]:
    """One for each claim."""
    return [
        _saving(index, 77.8, ("bitnet-1b", "ternary1.6"), ("gemma-3-1b", "float16")),
        _saving(index, 65.6, ("bitnet-1b", "ternary1.6"), ("qwen3-0.6b", "float16")),
        _saving(index, 29.0, ("bitnet-13b", "ternary1.6"), ("qwen3-4b", "int4")),
        _ten_minutes(index),
        _phone(index),
        _gpu_over_cpu(index),
        _lossless(index),
    ]


def _saving(
    index: Index, claimed: float, small: tuple[str, str], large: tuple[str, str]
) -> Verdict:
    """``small`` takes so many per cent less memory than ``large``, both in the same recipe."""
    theirs = published()["vram_mib"]
    printed = (theirs[small[0]][small[1]], theirs[large[0]][large[1]])
    with_two_bits = 100 * (1 - theirs[small[0]]["ternary2"] / printed[1])
    evidence: list[tuple[str, Value]] = []
    savings: dict[str, float] = {}
    compared: list[Record] = []
    for platform in index.platforms("vram"):
        for recipe in ("seed", "ours"):
            for weights in (small[1], "ternary2"):
                one = _memory(index, platform, recipe, small[0], weights)
                other = _memory(index, platform, recipe, *large)
                least, most = number(one, *MEMORY), number(other, *MEMORY)
                if one is None or other is None or least is None or most is None:
                    continue
                if one.kind != other.kind:
                    continue
                compared += [one, other]
                saving = 100 * (1 - least / most)
                name = f"{platform}, recipe {recipe}, {weights}"
                savings[name] = saving
                evidence += [
                    (f"{name}: {small[0]}", _mib(one)),
                    (f"{name}: {large[0]} {large[1]}", _mib(other)),
                    (f"{name}: saving", Value(f"{saving:.1f} %")),
                ]
    holding = [name for name, saving in savings.items() if saving >= claimed]
    reasons = [
        f"Published: {printed[0]:,} against {printed[1]:,} MiB. With the TQ2_0 column, which is "
        f"the one that grows as activations do, the same tables give {with_two_bits:.1f} %.",
    ]
    if savings:
        low, high = min(savings.values()), max(savings.values())
        reasons.append(
            f"In the same recipe on both sides, {how(compared)}: {low:.1f} to {high:.1f} % "
            f"({len(holding)} of {len(savings)} pairs reach {claimed} %)."
        )
    if holding and len(holding) < len(savings):
        reasons.append(f"It does with: {'; '.join(holding)}.")
    claim = f"{small[0]} takes {claimed:g} % less memory than {large[0]} {large[1]}"
    return _verdict(claim, _tone(len(holding), len(savings)), reasons, evidence)


def _memory(index: Index, platform: str, recipe: str, model: str, weights: str) -> Record | None:
    return index.first("vram", platform, model=model, weights=weights, recipe=recipe)


def _ten_minutes(index: Index) -> Verdict:
    evidence: list[tuple[str, Value]] = []
    spent: list[float] = []
    for record in smallest_epochs(index):
        epoch, compiling = record.metrics["epoch_seconds"], record.metrics["compile_seconds"]
        spent.append(epoch + compiling)
        steps = "" if is_whole(record) else f", {record.metrics['steps_run']} steps scaled"
        label = f"{record.platform} ({device_name([record])}): {shape_of(record)} a step{steps}"
        text = f"{seconds(epoch)} s, and {seconds(compiling)} s to compile"
        evidence.append((label, Value(text, record.digest)))
    holding = [each for each in spent if each <= 600]
    theirs = published()["epoch_seconds"]
    small, large = theirs["ternary1.6"][SMALLEST], theirs["ternary2"][SMALLEST]
    reasons = [
        f"Published: {small['s25_adreno_gpu']} s (TQ1_0) and {large['s25_adreno_gpu']} s (TQ2_0) "
        f"on a Galaxy S25; {small['nvidia_rtx4090']} and {large['nvidia_rtx4090']} s on an RTX "
        "4090. No phone was measured here; the condition is the hardware named.",
    ]
    tone = _tone(len(holding), len(spent))
    return _verdict(
        "bitnet-125m fine-tunes in ten minutes (one epoch, on a phone)",
        "mixed" if tone == "good" else tone,
        reasons,
        evidence,
    )


def _phone(index: Index) -> Verdict:
    evidence: list[tuple[str, Value]] = []
    needing: list[Record] = []
    fitting = 0
    for platform in index.platforms("vram"):
        for recipe in ("seed", "ours", "smallest"):
            for weights in ("ternary2", "ternary1.6"):
                record = _memory(index, platform, recipe, "bitnet-13b", weights)
                needed = number(record, *MEMORY)
                if record is None or needed is None:
                    continue
                needing.append(record)
                fitting += needed <= PHONE_BYTES
                evidence.append((f"{platform}, recipe {recipe}, {weights}", _mib(record)))
    theirs = published()["vram_mib"]["bitnet-13b"]
    reasons = [
        f"Published: {theirs['ternary1.6']:,} MiB (TQ1_0) and {theirs['ternary2']:,} MiB (TQ2_0) "
        "on a phone with 8 GB. No phone was measured here: these are what the job's arrays and "
        "scratch take, not what a phone leaves to a program.",
    ]
    if needing:
        reasons.append(f"{fitting} of {len(needing)} are below 8 GB, {how(needing)}.")
    tone = _tone(fitting, len(needing))
    claim = "a 13B model fine-tunes in a phone's memory"
    return _verdict(claim, "mixed" if tone == "good" else tone, reasons, evidence)


GENERATION = ("decode_tokens_per_second", "tokens_per_second")


def _with_their_hosts(index: Index) -> list[tuple[Record, Record]]:
    """Generation on GPUs, each with the same cell on the processor of that machine."""
    return [
        (device, host)
        for device in index.comparable("decode_throughput", "cuda")
        for host in index.find("host_decode", "cpu", **device.cell)
        if number(device, *GENERATION)
        and number(host, *GENERATION)
        and all(device.device.get(fact) == host.device.get(fact) for fact in ("cpu", "cores"))
    ]


def _gpu_over_cpu(index: Index) -> Verdict:
    """Generation on a GPU against the CPU of the same host."""
    evidence: list[tuple[str, Value]] = []
    ratios: list[float] = []
    measured = _with_their_hosts(index)
    for device, host in measured:
        fast, slow = (number(record, *GENERATION) or 0.0 for record in (device, host))
        ratios.append(fast / slow)
        label = f"{device.cell['model']} {device.cell['packing']}"
        evidence += [
            (f"{label} on the GPU", Value(short(fast), device.digest)),
            (f"{label} on its host's CPU", Value(short(slow), host.digest)),
        ]
    theirs = published()["decode_tokens_per_second"]
    pairs = (("pixel9_mali_gpu", "pixel9_cpu"), ("s25_adreno_gpu", "s25_cpu"))
    printed = [
        row[gpu] / row[cpu]
        for table in theirs.values()
        for row in table.values()
        for gpu, cpu in (*pairs, ("iphone16_gpu", "iphone16_cpu"))
        if row[gpu] and row[cpu]
    ]
    reasons = [
        "The range is that of one row of the table (1B, TQ1_0); over all of its rows the quotient "
        f"is {min(printed):.1f} to {max(printed):.1f}, of phones' GPUs and CPUs, which were not "
        "measured here.",
    ]
    if ratios:
        gpu, cpu = (device_name(records) for records in zip(*measured, strict=True))
        reasons.append(
            f"Measured: {min(ratios):.1f} to {max(ratios):.1f} times, {gpu} against {cpu}, each in "
            "its platform's own dtype."
        )
    holding = sum(ratio >= 2.1 for ratio in ratios)
    tone = _tone(holding, len(ratios))
    if tone == "good":
        tone = "mixed"
    said, more = _finetuning_over_cpu(index)
    reasons += said
    evidence += more
    return _verdict(
        "generation is 2.1 to 11.3 times faster on a GPU than on the CPU", tone, reasons, evidence
    )


def _finetuning_over_cpu(index: Index) -> tuple[list[str], list[tuple[str, Value]]]:
    """What is known of fine-tuning in equal cells; not what is claimed, so it decides nothing."""
    pairs = [
        (device, host)
        for device in index.find("finetune_throughput", "cuda")
        for host in index.find("finetune_throughput", "cpu", **device.cell)
        if number(device, "real_tokens_per_second") and number(host, "real_tokens_per_second")
    ]
    if not pairs:
        return [], []
    evidence: list[tuple[str, Value]] = []
    ratios: list[float] = []
    for pair in pairs:
        speeds = [number(record, "real_tokens_per_second") or 0.0 for record in pair]
        ratios.append(speeds[0] / speeds[1])
        for record, speed in zip(pair, speeds, strict=True):
            label = f"{record.cell['model']} fine-tuned, {shape_of(record)}, {record.platform}"
            evidence.append((f"{label}: tokens a second", Value(short(speed), record.digest)))
    gpu, cpu = (device_name(records) for records in zip(*pairs, strict=True))
    reason = (
        f"Fine-tuning, which the claim is not about, is {min(ratios):.0f} to {max(ratios):.0f} "
        f"times faster on {gpu} than on {cpu} in equal cells, each in its platform's own dtype."
    )
    return [reason], evidence


def _lossless(index: Index) -> Verdict:
    theirs = published()["lossless"]
    exact = [
        record
        for record in index.find("lossless")
        if record.status == "ok"
        and record.cell["dtype"] == record.cell["embedding"] == "float32"
        and record.cell["act_quant"] == "per_token"
    ]
    evidence = [
        (
            f"{r.platform}, {r.cell['model']}, {lossless_variant(r)}: mean KL, top token",
            Value(
                f"{r.metrics['kl_mean']:.1e}, {100 * r.metrics['top1_agreement']:.2f} %", r.digest
            ),
        )
        for r in exact
    ]
    holding = [
        record
        for record in exact
        if record.metrics["kl_mean"] <= theirs["kl_mean"]
        and record.metrics["top1_agreement"] >= theirs["top1_agreement"]
    ]
    reasons = [
        f"Published: mean KL {theirs['kl_mean']:.2e}, same top token "
        f"{100 * theirs['top1_agreement']:.2f} %, between two backends. Held to the same figures "
        "here: each implementation of the packed products against float32 master weights.",
    ]
    missing = [
        f"{r.platform}, {r.cell['model']}, {lossless_variant(r)}" for r in exact if r not in holding
    ]
    if holding and missing:
        reasons.append(f"It does not with: {'; '.join(missing)}.")
    claim = "inference is lossless: backends agree with the reference"
    return _verdict(claim, _tone(len(holding), len(exact)), reasons, evidence)


def _tone(holding: int, total: int) -> Tone:
    if not total:
        return "none"
    if holding == total:
        return "good"
    return "mixed" if holding else "bad"


def _verdict(
    claim: str, tone: Tone, reasons: Sequence[str], evidence: list[tuple[str, Value]]
) -> Verdict:
    return Verdict(
        claim=claim, verdict=WORDS[tone], tone=tone, reasons=list(reasons), evidence=evidence
    )


def _mib(record: Record) -> Value:
    mark = "" if record.kind == "run" else " *"
    return Value(f"{mib(number(record, *MEMORY) or 0)} MiB{mark}", record.digest)
