"""The look of all figures, and from a matplotlib figure to SVG text."""

import io
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by colour-blind readers and in grey.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#555555")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    # Outlines instead of names of fonts: it looks the same wherever it is opened.
    "svg.fonttype": "path",
    "svg.hashsalt": "fabric-jax",
    "figure.constrained_layout.use": True,
}


def new_figure(width: float = 6.8, height: float = 3.6, panels: int = 1) -> tuple[Any, list[Any]]:
    """A figure in inches with its axes side by side; needs no display."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings: Any = mpl.rcParams
    settings.update(STYLE)
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, panels, squeeze=False)[0]
    return figure, list(axes)


def to_svg(figure: "Figure") -> str:
    """The ``<svg>`` element, the same text for the same figure."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].strip()


def embedded(svg: str, name: str) -> str:
    """An ``<svg>`` whose ids are its own within a page, and that fits its column."""
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = svg.replace('xlink:href="#', f'xlink:href="#{name}-')
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)
