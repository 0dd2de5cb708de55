"""Figures of a report: drawn once by matplotlib, inline in the page in the reader's colours, or as a PNG.

In the page a figure's colours are CSS variables, so that it is readable on white and on black; its letters
are text, which the browser sets. Names come from users: nothing of them is taken for a formula.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import io
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from tide_megatron.evaluate.plots import COLOURS, DOTS_PER_INCH

WIDTH, HEIGHT = 5.0, 3.1
"""Of a figure, in inches."""
INK, DIM, LINE = "#22262b", "#5f6770", "#d9dce0"
"""Of text, of what is beside it, of grids; as PNGs have them."""
_VARIABLES = {INK: "--ink", DIM: "--dim", LINE: "--line"} | {
    colour.lower(): f"--c{number}" for number, colour in enumerate(COLOURS)
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": DIM,
    "xtick.color": DIM,
    "ytick.color": DIM,
    "xtick.labelcolor": DIM,
    "ytick.labelcolor": DIM,
    "grid.color": LINE,
}
LONGEST_NAME = 32
_ROUNDED = re.compile(r"(\d\.\d\d)\d+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One figure of the page."""

    key: str
    """Its PNG's name, without the ending."""
    title: str
    figure: Figure
    note: str = ""
    """A sentence below it."""

    def svg(self) -> str:
        """Return the figure for a page."""
        return svg_of(self.figure, f"{self.key}: {self.title}")

    def write(self, folder: Path) -> None:
        """Write the figure as a PNG, its title above it."""
        with drawing():
            self.figure.suptitle(shortened(self.title, 60), fontsize=11)
            self.figure.savefig(folder / f"{self.key}.png", dpi=DOTS_PER_INCH, facecolor="white")
            self.figure.suptitle("")


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Draw in this module's style; without words about letters that no font here has."""
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def new_figure(height: float = HEIGHT) -> tuple[Figure, Axes]:
    """Return an empty figure with one pair of axes; call it inside `drawing`."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def whole_steps(axes: Axes) -> None:
    """Label the horizontal axis with whole updates."""
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("updates")


def from_zero(axes: Axes) -> None:
    """Let the vertical axis begin at 0, with some room above what is drawn."""
    axes.set_ylim(0, max(axes.dataLim.y1 * 1.08, 1e-9))


def logarithmic(axes: Axes) -> None:
    """Make the vertical axis logarithmic, its numbers written out."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def line_style(number: int) -> dict[str, Any]:
    """Return how the line of a number is drawn: a colour, and dashes from the second turn on."""
    turn, place = divmod(number, len(COLOURS))
    return {"color": COLOURS[place], "linestyle": ("-", "--", ":")[turn % 3], "linewidth": 1.7}


def legend(figure: Figure, styles: Mapping[str, Mapping[str, Any]], *, always: bool = False) -> None:
    """Name lines below the axes; a single one only where there could be others (`always`)."""
    if len(styles) > 1 or always:
        handles = [Line2D([], [], **style) for style in styles.values()]
        labels = [shortened(name, LONGEST_NAME) for name in styles]
        widest = max(map(len, labels))
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=max(1, min(4, len(labels), 56 // (widest + 5))),
            frameon=False,
        )


def shortened(name: str, longest: int) -> str:
    """Return a name of at most so many characters, on one line."""
    plain = " ".join(name.split())
    return plain if len(plain) <= longest else plain[: longest - 1] + "…"


def svg_of(figure: Figure, label: str) -> str:
    """Return a figure as an SVG element that stands in a page of many.

    Args:
        figure: drawn inside `drawing`.
        label: what it shows, for who cannot see it; also keeps its ids apart from other figures'.
    """
    buffer = io.StringIO()
    with drawing(), mpl.rc_context({"svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for pattern in (
        r"<metadata>.*?</metadata>",
        r"<style type=\"text/css\">.*?</style>",  # of the whole page, in HTML
        r" id=\"[A-Za-z.0-9]+_\d+\"",  # the same in every figure
        r"<!--.*?-->",
        r" xmlns(:xlink)?=\"[^\"]*\"",
        r" version=\"1.1\"",
    ):
        text = re.sub(pattern, "", text, flags=re.DOTALL)
    text = re.sub(r"(?<=: )#[0-9a-f]{6}(?=[;\"])", lambda found: _variable(found[0]), text)
    # A hundredth of a point is finer than any screen; letters keep their digits.
    text = re.sub(r" (?:d|x|y|transform)=\"[^\"]*\"", lambda found: _ROUNDED.sub(r"\1", found[0]), text)
    return re.sub(
        r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", lambda found: _head(found[1], label), text, count=1
    )


def _variable(colour: str) -> str:
    return f"var({_VARIABLES[colour]})" if colour in _VARIABLES else colour


def _head(box: str, label: str) -> str:
    return f'<svg class="plot" {box} role="img" aria-label="{html.escape(label)}">'
