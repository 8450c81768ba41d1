"""The look of all figures, and from a matplotlib figure to SVG text."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by colour-blind readers and in grey.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#555555")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# As matplotlib names the outlines of letters, which are the same in all figures.
FONT = "DejaVuSans-"
LETTER = re.compile(rf'<path id="{FONT}[^>]*/>\n')
STYLED = re.compile(r' style="([^"]*)"')
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
    return _compact(text[text.index("<svg") :].strip())


def _compact(svg: str) -> str:
    """The same picture in half the bytes: hundredths of a point, no comments, no indentation."""
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' d="[^"]*"', lambda found: _shorter(re.sub(r"\s*\n\s*", "", found[0])), svg)
    svg = re.sub(r' (?:x|y)="[^"]*"|translate\([^)]*\)', lambda found: _shorter(found[0]), svg)
    return re.sub(r">\s+<", ">\n<", svg)


def _shorter(text: str) -> str:
    """Numbers rounded to hundredths."""
    return re.sub(r"-?\d+\.\d{3,}", lambda n: f"{float(n[0]):.2f}".rstrip("0").rstrip("."), text)


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What the figures of a page have in common, said once: letters and styles.

    Attributes:
        letters: the outline of each letter in any of them.
        classes: from a style to the class that stands for it.
    """

    letters: tuple[str, ...]
    classes: dict[str, str]

    def html(self) -> str:
        """An invisible ``<svg>`` that defines them."""
        hidden = 'width="0" height="0" style="position:absolute" aria-hidden="true"'
        outlines = "".join(self.letters).replace(f'id="{FONT}', 'id="l')
        rules = "\n".join(f".{name} {{{style}}}" for style, name in self.classes.items())
        return f"<svg {hidden}><style>\n{rules}\n</style><defs>\n{outlines}</defs></svg>"

    def embedded(self, svg: str, name: str) -> str:
        """A figure whose ids are its own within the page, and that fits its column."""
        svg = LETTER.sub("", svg).replace("<defs>\n</defs>\n", "")
        svg = re.sub(r'<g id="[^"]*"', "<g", svg)
        svg = re.sub(r'\bid="', f'id="{name}-', svg)
        svg = re.sub(r"url\(#", f"url(#{name}-", svg)
        svg = re.sub(rf'xlink:href="#(?!{FONT})', f'href="#{name}-', svg)
        svg = re.sub(rf'xlink:href="#{FONT}(\w+)"', r'href="#l\1"', svg)
        x = r'(<use href="#l\w+") transform="translate\(([-\d.]+) 0\)"'
        svg = re.sub(x, r'\1 x="\2"', svg)
        svg = STYLED.sub(lambda found: f' class="{self.classes[found[1]]}"', svg)
        return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)


def shared(svgs: Sequence[str]) -> Shared:
    """Of the figures of one page."""
    styles = sorted({style for svg in svgs for style in STYLED.findall(svg)})
    return Shared(
        letters=tuple(sorted({text for svg in svgs for text in LETTER.findall(svg)})),
        classes={style: f"s{i}" for i, style in enumerate(styles)},
    )
