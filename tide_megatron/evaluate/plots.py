"""Plots of a comparison: scores by noise level, training curves, paired differences.

Matplotlib draws into files without a display. A run keeps its colour (Okabe-Ito, safe for colour-blind
readers) and its marker in every plot, by its place in the list of runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from tide_megatron.base.errors import DataError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
DOTS_PER_INCH = 150
Scores = Mapping[str, Mapping[str, Any]]
"""Run name -> what `Likelihood.summary` returns."""


def plot_noise_levels(scores: Scores, reference: str, path: Path, *, compared: Sequence[str] = ()) -> None:
    """Draw NLL per byte, accuracy, and the NLL's difference to a run against the noise level, into a PNG.

    Args:
        scores: name -> scores, a line each.
        reference: the run that differences are taken to.
        path: file to write.
        compared: whose differences are drawn; a teacher far below would hide the others.
    """
    figure, (left, middle, right) = _figure(13.0, 4.2, 3)
    base = {row["time"]: row["nll_per_byte"] for row in scores[reference]["by_time"]}
    for index, (name, score) in enumerate(scores.items()):
        rows = score["by_time"]
        times = [row["time"] for row in rows]
        left.plot(times, [row["nll_per_byte"] for row in rows], **_style(index))
        middle.plot(times, [100 * row["masked_accuracy"] for row in rows], **_style(index))
        if name in compared:
            shared = [row for row in rows if row["time"] in base]
            change = [row["nll_per_byte"] - base[row["time"]] for row in shared]
            right.plot([row["time"] for row in shared], change, **_style(index))
    right.axhline(0.0, color="#666666", linewidth=1.0)
    middle.set_ylim(bottom=0)
    for axis in (left, middle, right):
        axis.set_xticks(sorted(base))
    level = "noise level t (share of tokens masked)"
    _label(left, level, "NLL / t, nats per byte")
    _label(middle, level, "masked tokens predicted right, %")
    _label(right, level, f"NLL / t, difference to {reference}")
    _legend(figure, list(scores))
    _save(figure, path)


def plot_training(
    records: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, *, order: Sequence[str] = ()
) -> None:
    """Draw what happened while training: a loss on the left, held-out NLL per byte on the right, into a PNG.

    The loss is the first term that all runs have, for objectives of different runs are not comparable;
    without a common term it is the objective. Without held-out scores there is one panel.

    Args:
        records: run name -> `read_metrics`.
        path: file to write.
        order: all names of the report, whose places give the colours; default: the records'.
    """
    order = order or list(records)
    name = _common_term(records)
    has_scores = any(record["kind"] == "evaluate" for run in records.values() for record in run)
    figure, axes = _figure(10.0 if has_scores else 5.5, 4.0, 2 if has_scores else 1)
    for who, run in records.items():
        index = order.index(who)
        points = [
            (record["step"], record[name]) for record in run if record["kind"] == "train" and record.get(name)
        ]
        if points:
            steps, values = zip(*points, strict=True)
            style = _style(index, marker="")
            axes[0].plot(steps, values, **{**style, "alpha": 0.25, "linewidth": 1.0})
            axes[0].plot(steps, smooth(values), **style)
        held_out = [
            (record["step"], record["nll_per_byte"]) for record in run if record["kind"] == "evaluate"
        ]
        if held_out:
            axes[1].plot(*zip(*held_out, strict=True), **_style(index))
    _label(
        axes[0], "updates", "objective" if name == "loss" else f"training loss, {name.removeprefix('loss/')}"
    )
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if has_scores:
        _label(axes[1], "updates", "held-out NLL, nats per byte")
    _legend(figure, list(records), order)
    _save(figure, path)


def plot_differences(
    differences: Mapping[str, tuple[float, float, float]],
    reference: str,
    path: Path,
    *,
    order: Sequence[str] = (),
) -> None:
    """Draw each run's paired difference to the reference with its 95 % interval, into a PNG.

    Args:
        differences: run name -> (mean, low, high) of the difference in nats per byte; negative is better.
        reference: name of the run they are differences to.
        path: file to write.
        order: all names of the report, whose places give the colours; default: the differences'.
    """
    order = order or list(differences)
    figure, (axis,) = _figure(7.0, 1.3 + 0.5 * len(differences), 1)
    axis.axvline(0.0, color="#666666", linewidth=1.0)
    for row, (who, (mean, low, high)) in enumerate(differences.items()):
        style = _style(order.index(who))
        axis.errorbar(
            mean,
            row,
            xerr=[[mean - low], [high - mean]],
            fmt=style["marker"],
            color=style["color"],
            capsize=4,
            linewidth=1.8,
            markersize=6,
        )
        axis.annotate(
            f"{mean:+.4f}",
            (mean, row),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
        )
    axis.set_yticks(range(len(differences)), list(differences))
    axis.set_ylim(len(differences) - 0.5, -0.7)
    axis.margins(x=0.15)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    _label(axis, f"difference to {reference}, nats/byte (left is better)", "")
    axis.grid(axis="y", visible=False)
    _save(figure, path)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read a run folder's `metrics.jsonl`.

    Raises:
        DataError: when it is missing or a line is not a record.
    """
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as fault:
        raise DataError(f"{path}: not readable ({fault.strerror}); is {folder} a run folder?") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["kind"], record["step"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path} line {number}: not a metrics record; remove the line") from None
        records.append(record)
    return records


def smooth(values: Sequence[float], reach: int | None = None) -> list[float]:
    """Return centred means over up to `reach` neighbours on each side, equally many per side."""
    reach = max(1, len(values) // 20) if reach is None else reach
    result = []
    for index in range(len(values)):
        side = min(reach, index, len(values) - 1 - index)
        result.append(sum(values[index - side : index + side + 1]) / (2 * side + 1))
    return result


def _common_term(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the first `loss/...` that every run reports, else `loss`."""
    names = [
        {name for record in run for name in record if name.startswith("loss/")} for run in records.values()
    ]
    common = set.intersection(*names) if names else set()
    return min(common) if common else "loss"


def _figure(width: float, height: float, panels: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(wspace=0.06))
    FigureCanvasAgg(figure)
    axes = numpy.atleast_1d(figure.subplots(1, panels))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#DDDDDD", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, list(axes)


def _style(index: int, marker: str | None = None) -> dict[str, Any]:
    turn, place = divmod(index, len(COLOURS))  # a second turn has other markers and dashed lines
    own = MARKERS[(place + turn) % len(MARKERS)] if marker is None else marker
    return {
        "color": COLOURS[place],
        "marker": own,
        "linestyle": ("-", "--", ":")[turn % 3],
        "linewidth": 1.8,
        "markersize": 5,
    }


def _label(axis: Axes, horizontal: str, vertical: str) -> None:
    axis.set_xlabel(horizontal)
    axis.set_ylabel(vertical)


def _legend(figure: Figure, names: Sequence[str], order: Sequence[str] = ()) -> None:
    """Name the runs once for all panels, below them."""
    order = order or names
    handles = [Line2D([], [], label=name, **_style(order.index(name))) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(names), 5), frameon=False)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH)
