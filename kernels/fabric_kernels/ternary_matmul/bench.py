"""Measures the products beside what the machine can do and beside XLA's own dots.

``python -m fabric_kernels.ternary_matmul.bench [--model NAME ...] [--rows M ...] [--json FILE]``

All of a shape is timed in turn, again and again, the machine's peaks among it: ratios within one
run are what counts, since a machine's clock and its other work change from minute to minute.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fabric_kernels import cpu_library
from fabric_kernels.ternary_matmul.arg_specs import MODELS, distinct_shapes
from fabric_kernels.ternary_matmul.bench_cases import (
    Case,
    kernel_cases,
    layers_for,
    streaming_cases,
    xla_cases,
)
from fabric_kernels.ternary_matmul.peaks import (
    PIECE_BYTES,
    Peaks,
    largest_cache_bytes,
    make_peaks,
    pool_threads,
)

DEFAULTS = {"model": ["bitnet-125m", "bitnet-2b-4t"], "rows": [1, 8, 128, 512], "rounds": 7}
QUICK = {"model": ["bitnet-2b-4t"], "rows": [1, 128], "rounds": 3}
# A sample repeats a call until this much time has passed.
SAMPLE_SECONDS = 0.01
PEAK_SECONDS = 0.05
MOST_CALLS = 64


@dataclass(frozen=True, kw_only=True)
class Result:
    """One line of the table.

    Attributes:
        case: what ran.
        model: the model whose shape it is.
        seconds: of a product with one matrix, from each round.
        dot_peak: operations a second of the dot-product instruction, the median of these rounds.
        read_peak: bytes a second of reading memory, likewise.
        xla: median seconds of XLA's fastest dot for the same product; None where none was timed.
    """

    case: Case
    model: str
    seconds: np.ndarray
    dot_peak: float
    read_peak: float
    xla: float | None

    def record(self) -> dict[str, Any]:
        """Flat and short; ``spread`` is that of the middle half, in parts of the median."""
        case = self.case
        low, median, high = np.percentile(self.seconds, (25, 50, 75))
        operations = case.operations / case.layers / median
        read = case.weight_bytes / case.layers / median
        return {
            "model": self.model,
            "case": case.name,
            "packing": case.packing,
            "n": case.n,
            "k": case.k,
            "rows": case.rows,
            "layers": case.layers,
            "median_us": round(1e6 * median, 2),
            "best_us": round(1e6 * float(np.min(self.seconds)), 2),
            "spread": round((high - low) / median, 3),
            "gop_per_s": round(operations / 1e9, 2),
            "weight_gb_per_s": round(read / 1e9, 3),
            "of_dot_peak": round(operations / self.dot_peak, 3),
            "of_read_peak": round(read / self.read_peak, 3),
            "times_xla": None if self.xla is None else round(self.xla / median, 2),
        }


def measure(cases: Sequence[Case], model: str, peaks: Peaks, rounds: int) -> list[Result]:
    """Times each case and the peaks once a round."""
    calls = [_calls(case) for case in cases]
    seconds = np.empty((len(cases), rounds))
    dots, reads = np.empty(rounds), np.empty(rounds)
    for i in range(rounds):
        dots[i] = peaks.dot_operations(PEAK_SECONDS)
        reads[i] = peaks.read_bytes(PEAK_SECONDS)
        for j, (case, count) in enumerate(zip(cases, calls, strict=True)):
            start = time.perf_counter()
            for _ in range(count):
                case.run()
            seconds[j, i] = (time.perf_counter() - start) / (count * case.layers)
    medians = np.median(seconds, axis=-1)
    return [
        Result(
            case=case,
            model=model,
            seconds=own,
            dot_peak=float(np.median(dots)),
            read_peak=float(np.median(reads)),
            xla=_fastest_xla(case, cases, medians),
        )
        for case, own in zip(cases, seconds, strict=True)
    ]


def run(
    models: list[str], rows: Sequence[int], rounds: int, peaks: Peaks
) -> Iterator[list[Result]]:
    """The results of one shape after another, then those of each model's largest matrix streamed.

    What is streamed is as large as what the peak of reading reads.
    """
    for n, k, model, layers in distinct_shapes(models):
        for m in rows:
            count = layers_for(n, k, m, layers)
            cases = [*kernel_cases(n, k, m, count), *xla_cases(n, k, m, count)]
            yield measure(cases, model, peaks, rounds)
    for model in models:
        n, k = max(MODELS[model].shapes.values(), key=lambda shape: shape[0] * shape[1])
        yield measure(streaming_cases(n, k, peaks.buffer.nbytes), model, peaks, rounds)


def machine(peaks: Peaks) -> dict[str, Any]:
    """What the figures are true of."""
    library = cpu_library.load()
    return {
        "processor": _processor(),
        "isa": library.isa,
        "threads": peaks.threads,
        "cache_bytes": largest_cache_bytes(),
        "system": platform.platform(),
        "compiler": library.compiler,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "numpy": np.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "read_streams": peaks.streams,
        "read_ahead": peaks.ahead,
        "read_bytes": peaks.buffer.nbytes,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table while it grows, and writes the JSON at the end."""
    options = parse(arguments)
    jax.config.update("jax_platforms", "cpu")
    status = cpu_library.status()
    if status.library is None:
        print(f"no CPU kernels to measure: {status.problem}. {status.fix}.", file=sys.stderr)
        return 2
    peaks = make_peaks(pool_threads(), options.stream_mb << 20, PEAK_SECONDS)
    facts = machine(peaks)
    print(f"{facts['processor']}, {facts['isa']}, {facts['threads']} threads")
    print(f"jax {facts['jax']}, load {facts['load_average'][0]}, {options.rounds} rounds")
    records: list[dict[str, Any]] = []
    dots: list[float] = []
    reads: list[float] = []
    for results in run(options.model, options.rows, options.rounds, peaks):
        dots.append(results[0].dot_peak)
        reads.append(results[0].read_peak)
        lines = [result.record() for result in results]
        _print_table(lines, dots[-1], reads[-1])
        records += lines
    if options.json is not None:
        settings = {"models": options.model, "rows": options.rows, "rounds": options.rounds}
        written = {
            "machine": facts,
            "settings": settings,
            "dot_peak_gop_per_s": round(float(np.median(dots)) / 1e9, 1),
            "read_peak_gb_per_s": round(float(np.median(reads)) / 1e9, 2),
            "results": records,
        }
        text = json.dumps(written, separators=(",", ":")).replace('},{"model"', '},\n{"model"')
        part = options.json.with_name(f".{options.json.name}.part")
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(options.json)
    return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options, or a message on standard error and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m fabric_kernels.ternary_matmul.bench")
    parser.add_argument("--model", nargs="+", metavar="NAME", help="whose shapes; or: all")
    parser.add_argument("--rows", nargs="+", type=int, metavar="M", help="rows of the input")
    parser.add_argument("--rounds", type=int, help="how often everything is timed")
    parser.add_argument(
        "--stream-mb",
        type=int,
        default=_stream_megabytes(),
        metavar="MB",
        help="what is read from memory; larger than every cache",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results are written")
    parser.add_argument("--quick", action="store_true", help="one model, two rows, three rounds")
    options = parser.parse_args(arguments)
    defaults = QUICK if options.quick else DEFAULTS
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.model == ["all"]:
        options.model = list(MODELS)
    for name in options.model:
        if name not in MODELS:
            close = get_close_matches(name, MODELS, n=1)
            meant = f" (did you mean {close[0]}?)" if close else ""
            parser.error(f"no ternary model {name!r}{meant}; there are {', '.join(MODELS)}")
    if min([*options.rows, options.rounds]) < 1:
        parser.error("--rows and --rounds take whole numbers from 1")
    if options.stream_mb << 20 < pool_threads() * PIECE_BYTES:
        parser.error(f"--stream-mb is at least {pool_threads()}, found {options.stream_mb}")
    if options.json is not None:
        folder = options.json.absolute().parent
        if options.json.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            parser.error(f"--json cannot be written: {options.json} is no file in a folder of ours")
    return options


def _stream_megabytes() -> int:
    """Four times the largest cache, from 256 MB to 1 GB."""
    return int(np.clip(4 * (largest_cache_bytes() or 0) >> 20, 256, 1024))


def _calls(case: Case) -> int:
    start = time.perf_counter()
    case.run()
    spent = time.perf_counter() - start
    return int(np.clip(np.ceil(SAMPLE_SECONDS / spent), 1, MOST_CALLS))


def _fastest_xla(case: Case, cases: Sequence[Case], medians: np.ndarray) -> float | None:
    """Of the same direction."""
    backward = "transposed" in case.name
    times = [
        median
        for other, median in zip(cases, medians, strict=True)
        if other.name.startswith("xla-") and ("transposed" in other.name) == backward
    ]
    return min(times) if times else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _print_table(lines: Sequence[dict[str, Any]], dot_peak: float, read_peak: float) -> None:
    first = lines[0]
    print(
        f"\n{first['model']}: N {first['n']}, K {first['k']}, M {first['rows']}"
        f"   (peaks: {dot_peak / 1e9:.0f} GOP/s, {read_peak / 1e9:.1f} GB/s)"
    )
    columns = ("median us", "best us", "spread", "GOP/s", "of peak", "GB/s", "of peak", "x XLA")
    print(f"{'':34}" + "".join(f"{column:>11}" for column in columns))
    for line in lines:
        times = "" if line["times_xla"] is None else f"{line['times_xla']:.2f}"
        cells = (
            f"{line['median_us']:.1f}",
            f"{line['best_us']:.1f}",
            f"{line['spread']:.0%}",
            f"{line['gop_per_s']:.0f}",
            f"{line['of_dot_peak']:.0%}",
            f"{line['weight_gb_per_s']:.1f}",
            f"{line['of_read_peak']:.0%}",
            times,
        )
        label = f"{line['case']} {line['packing']}".strip()
        print(f"{label:34}" + "".join(f"{cell:>11}" for cell in cells), flush=True)


if __name__ == "__main__":
    sys.exit(main())
