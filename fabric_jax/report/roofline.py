"""Products on an accelerator against its two limits, from what ``bench_device`` wrote.

``python -m fabric_jax.report.roofline TIMINGS.json FIGURE.svg``; the tables that
``fabric_kernels.tune`` writes are such timings too.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fabric_kernels.ternary_matmul.device_cases import DeviceCase, Limits, Timing

from fabric_jax.errors import FabricError
from fabric_jax.files import write_atomically
from fabric_jax.report.plot import COLOURS, MARKERS, new_figure, to_svg

PANELS = {"linear": "forward, with quantiser", "linear_transposed": "backward, by the input"}


def parse_timings(record: dict[str, Any]) -> tuple[Limits, list[Timing]]:
    """Limits of the device and all timings.

    Raises:
        KeyError, TypeError, ValueError: it is not such a record.
    """
    columns = record["columns"]
    timings = [Timing(**dict(zip(columns, row, strict=True))) for row in record["timings"]]
    return Limits(**record["limits"]), timings


def position(timing: Timing, limits: Limits) -> tuple[float, float]:
    """Operations a byte, and operations a second."""
    names: Any = (timing.product, timing.implementation, timing.packing)
    case = DeviceCase(
        product=names[0],
        implementation=names[1],
        packing=names[2],
        rows=timing.rows,
        n=timing.n,
        k=timing.k,
    )
    operations = 2.0 * timing.rows * timing.n * timing.k
    bytes_moved = case.at_limits(limits)[0] * limits.bytes_per_second
    return operations / bytes_moved, operations / (1e-6 * timing.microseconds)


def draw(record: dict[str, Any]) -> str:
    """The figure as SVG text: a panel a product, a colour an implementation, and the roofs."""
    limits, timings = parse_timings(record)
    shown = [name for name in PANELS if any(one.product == name for one in timings)]
    if not shown:
        raise ValueError(f"no timings of {' or '.join(PANELS)}")
    names = sorted({one.implementation for one in timings})
    figure, axes = new_figure(width=4.4 * len(shown) + 0.8, height=4.0, panels=len(shown))
    for axis, product in zip(axes, shown, strict=True):
        own = [one for one in timings if one.product == product]
        for i, name in enumerate(names):
            found = [position(one, limits) for one in own if one.implementation == name]
            if found:
                x, y = zip(*found, strict=True)
                axis.loglog(
                    x,
                    [value / 1e12 for value in y],
                    linestyle="none",
                    marker=MARKERS[i % len(MARKERS)],
                    color=COLOURS[i % len(COLOURS)],
                    markersize=4,
                    alpha=0.75,
                    label=name,
                )
        rates = {"bf16": limits.bf16_per_second, "int8": limits.int8_per_second}
        if product != "linear":
            del rates["int8"]
        _roofs(axis, limits.bytes_per_second, rates, [position(one, limits)[0] for one in own])
        axis.set(title=PANELS[product], xlabel="operations a byte", ylabel="Top/s")
        axis.legend(fontsize=7, loc="lower right")
    figure.suptitle(f"{record['device']}, jax {record['jax']}: measured limits")
    return to_svg(figure)


def _roofs(
    axis: Any, bandwidth: float, rates: dict[str, float], intensities: Sequence[float]
) -> None:
    """What bandwidth and rates of operations allow, over the width of the points."""
    low, high = min(intensities) / 2, max(intensities) * 2
    for (name, rate), style in zip(rates.items(), ("--", "-"), strict=False):
        knee = rate / bandwidth
        x = [low, *([knee] if low < knee < high else []), high]
        y = [min(rate, bandwidth * one) / 1e12 for one in x]
        axis.loglog(x, y, style, color="#555555", linewidth=1)
        axis.annotate(name, (high, y[-1]), fontsize=7, ha="right", va="bottom")


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads timings and writes the figure."""
    parser = argparse.ArgumentParser(prog="python -m fabric_jax.report.roofline")
    parser.add_argument("timings", type=Path, metavar="TIMINGS.json")
    parser.add_argument("figure", type=Path, metavar="FIGURE.svg")
    options = parser.parse_args(arguments)
    try:
        svg = draw(json.loads(options.timings.read_text(encoding="utf-8")))
        write_atomically(options.figure, svg.encode())
    except FabricError as error:
        print(error, file=sys.stderr)
        return 2
    except (OSError, KeyError, TypeError, ValueError) as error:
        print(
            f"{options.timings} has no timings as bench_device writes them ({error}): "
            "make them with python -m fabric_kernels.ternary_matmul.bench_device --json",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
