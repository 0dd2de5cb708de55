"""Figures over updates: losses, held-out scores, gradients, rates; one line a run, or one a term."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy
from matplotlib.axes import Axes

from tide_megatron.report.figure import (
    Panel,
    drawing,
    from_zero,
    legend,
    line_style,
    logarithmic,
    new_figure,
    whole_steps,
)
from tide_megatron.report.reading import Figures, ReportedRun, Series
from tide_megatron.report.thinning import thinned

LOG_FROM = 30.0
"""A positive figure whose largest value is so many times its smallest is drawn on a logarithmic axis."""
MARKED = 30
"""Curves of at most so many points have them marked."""
SMOOTHED = 60
"""Curves of more points than this have a smooth line over them."""


def over_steps(
    key: str,
    title: str,
    unit: str,
    lines: Mapping[str, Series],
    *,
    numbers: Mapping[str, int],
    factor: float = 1,
) -> Panel:
    """Draw courses over updates.

    Args:
        key: of the panel.
        title: of the panel.
        unit: of the vertical axis.
        lines: name -> course.
        numbers: name -> number of its colour.
        factor: the values are multiplied by it.
    """
    longest = 0
    with drawing():
        figure, axes = new_figure()
        for name, series in lines.items():
            longest = max(longest, _draw(axes, series, numbers[name], factor))
        whole_steps(axes)
        axes.set_ylabel(unit)
        if _spans_decades([series for series in lines.values()]):
            logarithmic(axes)
        elif unit.startswith("%"):
            from_zero(axes)
        legend(figure, {name: line_style(numbers[name]) for name in lines}, always=len(numbers) > 1)
    note = f"Each point is the mean of {longest} records or more, in a band from the smallest to the largest."
    return Panel(key=key, title=title, figure=figure, note=note if longest > 1 else "")


def _draw(axes: Axes, series: Series, number: int, factor: float) -> int:
    """Draw one course; return how many records a point stands for."""
    points, style = thinned(series), line_style(number)
    mean = points.mean * factor
    if points.records > 1:
        axes.fill_between(
            points.steps,
            points.low * factor,
            points.high * factor,
            color=style["color"],
            alpha=0.2,
            linewidth=0,
        )
    if len(mean) > SMOOTHED:
        axes.plot(points.steps, mean, **{**style, "linewidth": 0.8, "alpha": 0.35})
        axes.plot(points.steps, _smooth(mean), **style)
    else:
        marker: dict[str, Any] = {"marker": "o", "markersize": 3.5} if len(mean) <= MARKED else {}
        axes.plot(points.steps, mean, **style, **marker)
    return points.records


def _smooth(values: numpy.typing.NDArray[numpy.float64]) -> numpy.typing.NDArray[numpy.float64]:
    """Return centred means over a twentieth of the points; fewer, equally many a side, near the ends."""
    number = len(values)
    sums = numpy.concatenate([[0.0], numpy.cumsum(values)])
    place = numpy.arange(number)
    side = numpy.minimum(max(1, number // 40), numpy.minimum(place, number - 1 - place))
    found: numpy.typing.NDArray[numpy.float64] = (sums[place + side + 1] - sums[place - side]) / (
        2 * side + 1
    )
    return found


def _spans_decades(series: Sequence[Series]) -> bool:
    low, high = min(float(one.values.min()) for one in series), max(float(one.values.max()) for one in series)
    return low > 0 and high / low > LOG_FROM


def by_run(
    runs: Sequence[ReportedRun], name: str, chosen: Callable[[ReportedRun], Figures] = lambda run: run.train
) -> dict[str, Series]:
    """Return the course of one figure in every run that has it."""
    return {run.name: chosen(run)[name] for run in runs if name in chosen(run)}


def losses(runs: Sequence[ReportedRun], numbers: Mapping[str, int]) -> list[Panel]:
    """Draw the objective, each of its terms, and the gradient's norm."""
    terms = list(dict.fromkeys(name for run in runs for name in run.named("loss/")))
    wanted = [("loss", "objective", "nats")]
    wanted += [(f"loss/{term}", f"term {term}{_weights(runs, term)}", "before its weight") for term in terms]
    wanted += [("grad_norm", "gradient norm before clipping", "global norm")]
    return [
        over_steps(name.replace("/", "-"), title, unit, lines, numbers=numbers)
        for name, title, unit in wanted
        if (lines := by_run(runs, name))
    ]


def _weights(runs: Sequence[ReportedRun], term: str) -> str:
    """Say with which weight a term enters the objective, where all runs agree."""
    found = {
        run.recipe.terms[term].weight for run in runs if run.recipe is not None and term in run.recipe.terms
    }
    return f" (weight {found.pop():g})" if len(found) == 1 else ""


def held_out(runs: Sequence[ReportedRun], numbers: Mapping[str, int]) -> list[Panel]:
    """Draw held-out scores over the run, and the newest by noise level."""
    wanted = [
        ("nll_per_byte", "held-out bound", "nats a byte", 1.0),
        ("masked_accuracy", "masked tokens predicted right", "%", 100.0),
    ]
    found = []
    for name, title, unit, factor in wanted:
        if lines := by_run(runs, name, lambda run: run.scores):
            found.append(over_steps(name, title, unit, lines, numbers=numbers, factor=factor))
        levels = {run.name: _levels(run.scores, name) for run in runs}
        if any(len(points) > 1 for points in levels.values()):
            shown = {run: points for run, points in levels.items() if points}
            found.append(by_level(f"{name}-levels", f"{title}, by noise level", unit, shown, numbers, factor))
    return found


def _levels(scores: Figures, name: str) -> dict[float, float]:
    """Return the newest scores by noise level."""
    found = {}
    for full, series in scores.items():
        start, _, level = full.partition("/")
        if start == name and level.replace(".", "", 1).isdigit():
            found[float(level)] = series.last
    return dict(sorted(found.items()))


def by_level(
    key: str,
    title: str,
    unit: str,
    lines: Mapping[str, Mapping[float, float]],
    numbers: Mapping[str, int],
    factor: float = 1,
    *,
    dashed: Sequence[str] = (),
) -> Panel:
    """Draw figures against the noise level.

    Args:
        key: of the panel.
        title: of the panel.
        unit: of the vertical axis.
        lines: name -> noise level -> value.
        numbers: name -> number of its colour.
        factor: the values are multiplied by it.
        dashed: lines that are drawn faint and dashed.
    """
    styles = {
        name: line_style(numbers[name]) | ({"linestyle": "--", "alpha": 0.7} if name in dashed else {})
        for name in lines
    }
    with drawing():
        figure, axes = new_figure()
        for name, points in lines.items():
            values = [value * factor for value in points.values()]
            axes.plot(list(points), values, marker="o", markersize=4, **styles[name])
        axes.set_xlabel("noise level t (share of tokens masked)")
        axes.set_ylabel(unit)
        axes.set_xlim(0, 1)
        from_zero(axes)
        legend(figure, styles, always=len(numbers) > 1)
    return Panel(key=key, title=title, figure=figure)


def speed(runs: Sequence[ReportedRun], numbers: Mapping[str, int]) -> list[Panel]:
    """Draw rates, utilisation and memory."""
    wanted = [
        ("tokens_per_second", "throughput, all devices", "tokens a second", 1.0),
        ("mfu", "model FLOP utilisation", "% of the peak", 100.0),
        ("tflops_per_device", "arithmetic of one device", "TFLOP/s", 1.0),
        ("peak_memory_bytes", "largest memory of any rank so far", "GB", 1e-9),
        ("seconds_per_step", "time of an update", "seconds", 1.0),
    ]
    has_mfu = any("mfu" in run.train for run in runs)
    return [
        over_steps(name, title, unit, lines, numbers=numbers, factor=factor)
        for name, title, unit, factor in wanted
        if (lines := by_run(runs, name)) and not (name == "tflops_per_device" and has_mfu)
    ]


def gradients(run: ReportedRun, prefix: str) -> list[Panel]:
    """Draw the norm of each term's gradient, and its cosine with the cross-entropy's."""
    found = []
    terms = {name: number for number, name in enumerate(run.named("gradient_norm/"))}
    for kind, title, unit in (
        ("gradient_norm", "norm of each term's gradient", "norm, with the term's weight"),
        ("gradient_cosine", "its cosine with the cross-entropy's", "cosine"),
    ):
        if lines := run.named(f"{kind}/"):
            panel = over_steps(f"{prefix}{kind}", title, unit, lines, numbers=terms)
            if kind == "gradient_cosine":
                axes = panel.figure.axes[0]
                axes.axhline(0, color=axes.spines["left"].get_edgecolor(), linewidth=0.8)
                axes.set_ylim(-1.05, 1.05)
            found.append(panel)
    return found
