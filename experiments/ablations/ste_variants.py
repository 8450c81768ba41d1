"""Which variant of straight-through training learns best? One switch at a time, several seeds.

Every cell trains a small model from random weights on Python's standard library with the published
two-stage recipe; held-out files give bits per byte. Each variant differs from BitNet b1.58 in one
switch; where it comes from is in ``VARIANTS``. Float weights are the line that none should cross.

    PYTHONPATH=.:kernels python3 -m experiments.ablations.ste_variants --out DIR

leaves a record a cell in ``DIR/records.jsonl``, and ``table.md`` and ``figure.png`` made from the
records; cells that have a record are not run again. On an H100 about six minutes, most of it
compilation; on two CPU cores ``--num-layers 1 --tokens 100000 --rows 8 --length 128 --vocab 1024``.
"""

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
from rich.console import Console

from fabric_jax.data.config import DataConfig
from fabric_jax.data.stdlib import STDLIB
from fabric_jax.files import new_file, write_atomically
from fabric_jax.measurement.device import device_facts
from fabric_jax.quantization.ste_options import SteOptions
from fabric_jax.training.config import PretrainConfig
from fabric_jax.training.loop import pretrain

COLUMNS = ("bits_per_byte", "eval_loss")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One difference from BitNet b1.58.

    Attributes:
        source: where it was proposed.
        ste: its quantisers.
        gate: activation of the gate.
        sub_norms: whether there are norms before o and down.
    """

    source: str
    ste: SteOptions = field(default_factory=SteOptions)
    gate: Literal["silu", "relu2"] = "silu"
    sub_norms: Literal["yes", "no"] = "yes"


VARIANTS: dict[str, Variant] = {
    "b1.58": Variant(source="arXiv:2402.17764"),
    "clipped gradient": Variant(
        source="arXiv:1602.02830", ste=SteOptions(weight_gradient="clipped")
    ),
    "stochastic rounding": Variant(
        source="arXiv:1511.00363", ste=SteOptions(weight_rounding="stochastic")
    ),
    "scale by channel": Variant(source="arXiv:2406.07177", ste=SteOptions(weight_scale="channel")),
    "scale by group of 128": Variant(
        source="arXiv:2407.12327", ste=SteOptions(weight_scale="group")
    ),
    "int4 hybrid (a4.8)": Variant(
        source="arXiv:2411.04965", ste=SteOptions(activations="int4-hybrid")
    ),
    "Hadamard (v2)": Variant(source="arXiv:2504.18415", ste=SteOptions(hadamard=True)),
    "squared ReLU": Variant(source="arXiv:2504.12285", gate="relu2"),
    "no sub-norms": Variant(source="Falcon-E, HF1BitLLM", sub_norms="no"),
    "float weights": Variant(source="none: not quantised", ste=SteOptions(weights="none")),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run.

    Attributes:
        variant: a key of ``VARIANTS``.
        seed: of weights and order.
        model: registry name.
        num_layers: 0 for the model's.
        tokens: positions to train on.
        rows: of a step.
        length: positions in a row.
        vocab: tokens of the BPE vocabulary.
        folder: of the tokenised corpus, shared by all cells.
    """

    variant: str = "b1.58"
    seed: int = 0
    model: str = "bitnet-tiny"
    num_layers: int = 0
    tokens: int = 3_000_000
    rows: int = 32
    length: int = 256
    vocab: int = 4096
    folder: str = ""


def config() -> Cell:
    return Cell()


def cells(base: Cell, seeds: Sequence[int] = (0, 1, 2)) -> list[Cell]:
    """Every variant with every seed; equal programs one after another."""
    return [replace(base, variant=name, seed=seed) for name in VARIANTS for seed in seeds]


def run_config(cell: Cell, output: str) -> PretrainConfig:
    variant = VARIANTS[cell.variant]
    return PretrainConfig(
        model=cell.model,
        num_layers=cell.num_layers,
        output=output,
        corpus=str(Path(cell.folder or output) / f"corpus-{cell.vocab}"),
        train_tokenizer=cell.vocab,
        dataset=DataConfig(
            data=STDLIB,
            eval_fraction=0.02,
            max_length=cell.length,
            batch_size=cell.rows,
            data_seed=cell.seed,
        ),
        token_budget=cell.tokens,
        eval_every=10**9,
        save_every=0,
        log_every=10,
        tensorboard=False,
        samples=0,
        seed=cell.seed,
        ste=variant.ste,
        act_quant="none" if variant.ste.weights == "none" else None,
        gate=variant.gate,
        sub_norms=variant.sub_norms,
    )


def measure(cell: Cell) -> dict[str, Any]:
    """Trains one model; what it came to on the held-out files."""
    with tempfile.TemporaryDirectory() as output:
        summary = pretrain(run_config(cell, output), console=Console(stderr=True, quiet=True))
    return {
        "bits_per_byte": summary.eval_bits_per_byte_last,
        "eval_loss": summary.eval_loss_last,
        "loss_last": summary.loss_last,
        "parameters": summary.parameters,
        "steps": summary.steps,
        "tokens_per_second": summary.tokens_per_second,
        "packs": not VARIANTS[cell.variant].ste.beyond_packed,
    }


def summarise(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, standard error and paired difference to b1.58 of each variant, best first."""
    by_variant: dict[str, dict[int, float]] = {}
    packs: dict[str, bool] = {}
    for record in records:
        name = record["cell"]["variant"]
        by_variant.setdefault(name, {})[record["cell"]["seed"]] = record["bits_per_byte"]
        packs[name] = record["packs"]
    base = by_variant.get("b1.58", {})
    rows: list[dict[str, Any]] = []
    for name, found in by_variant.items():
        paired = [found[seed] - base[seed] for seed in found if seed in base]
        rows.append(
            {
                "variant": name,
                "source": VARIANTS[name].source,
                "seeds": len(found),
                "bits_per_byte": statistics.fmean(found.values()),
                "error": _standard_error(list(found.values())),
                "to_b1.58": statistics.fmean(paired) if paired else None,
                "to_b1.58_error": _standard_error(paired),
                "packs": packs[name],
            }
        )
    return sorted(rows, key=lambda row: row["bits_per_byte"])


def _standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The summary in Markdown; differences are paired by seed."""
    lines = [
        "| variant | source | held-out bits per byte | difference to b1.58 | packs |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        difference = "" if row["variant"] == "b1.58" else _plus_minus(row, "to_b1.58", "+.4f")
        lines.append(
            f"| {row['variant']} | {row['source']} | {_plus_minus(row, 'bits_per_byte', '.4f')} | "
            f"{difference} | {'yes' if row['packs'] else 'no'} |"
        )
    return "\n".join(lines) + "\n"


def _plus_minus(row: dict[str, Any], name: str, form: str) -> str:
    error = row["error" if name == "bits_per_byte" else f"{name}_error"]
    if row[name] is None:
        return ""
    return f"{row[name]:{form}}" + ("" if error is None else f" ± {error:.4f}")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bits per byte by variant, with standard errors over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    names = [row["variant"] for row in rows]
    errors = [row["error"] or 0.0 for row in rows]
    colors = ["tab:blue" if row["packs"] else "tab:grey" for row in rows]
    places = range(len(rows))
    values = [row["bits_per_byte"] for row in rows]
    axes.barh(places, values, xerr=errors, color=colors, height=0.6)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    low, high = min(values) - max(errors), max(values) + max(errors)
    axes.set_xlim(low - 0.3 * (high - low + 0.01), high + 0.1 * (high - low + 0.01))
    axes.set_xlabel("held-out bits per byte (grey: packed weights can't express it)")
    axes.grid(axis="x", alpha=0.3)
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def main() -> None:
    """Runs what has no record yet, then makes table and figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    for name in ("model", "num_layers", "tokens", "rows", "length", "vocab"):
        value = getattr(config(), name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args())
    out = Path(given.pop("out"))
    out.mkdir(parents=True, exist_ok=True)
    seeds = given.pop("seeds")
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder) / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        base = replace(config(), folder=folder, **given)
        records = run_all(cells(base, seeds), out / "records.jsonl")
    rows = summarise(records)
    write_atomically(out / "table.md", table(rows).encode())
    draw(rows, out / "figure.png")
    print(table(rows))


def run_all(chosen: Sequence[Cell], path: Path) -> list[dict[str, Any]]:
    """A record of each cell, those of earlier runs of this program included."""
    lines = path.read_text().splitlines() if path.is_file() else []
    records = [json.loads(line) for line in lines]
    done = {json.dumps(record["cell"]) for record in records}
    for cell in chosen:
        named = {name: value for name, value in asdict(cell).items() if name != "folder"}
        if json.dumps(named) in done:
            continue
        record = {"experiment": "ste_variants", "cell": named} | measure(cell)
        record["device"] = device_facts().kind
        records.append(record)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{cell.variant}, seed {cell.seed}: {record['bits_per_byte']:.4f}", flush=True)
    return records


if __name__ == "__main__":
    main()
