"""How far the student is from each teacher, and which chunks a chunk loss pushes up or down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy

from tide_megatron.report.curves import by_level, over_steps
from tide_megatron.report.figure import Panel, drawing, legend, line_style, new_figure
from tide_megatron.report.page import table
from tide_megatron.report.reading import ReportedRun, Series

Measured = Mapping[str, Any]
"""What `agreement.jsonl` says of one teacher at one moment."""


def measured(run: ReportedRun, teacher: str) -> Iterator[tuple[int, Measured]]:
    """Yield (step, measurement) of one teacher, oldest first."""
    for line in run.agreement:
        if teacher in line["teachers"]:
            yield int(line["step"]), line["teachers"][teacher]


def teachers_of(run: ReportedRun) -> list[str]:
    """Return the teachers that were measured."""
    return list(dict.fromkeys(name for line in run.agreement for name in line["teachers"]))


def agreement(runs: Sequence[ReportedRun], numbers: Mapping[str, int]) -> list[Panel]:
    """Draw KL and the share of equal first ids of each teacher: by noise level, and over the run."""
    found = []
    for teacher in dict.fromkeys(name for run in runs for name in teachers_of(run)):
        for key, what, unit, factor in (
            ("kl", "KL({} || student)", "nats a token", 1.0),
            ("chunk_kl", "KL({} || student) of chunks", "nats a chunk", 1.0),
            ("top1", "most likely id is that of {}", "% of masked tokens", 100.0),
        ):
            has_ids = any("kl" in last for run in runs for _, last in measured(run, teacher))
            if key == "chunk_kl" and has_ids:
                continue  # tokens say it with more digits
            title = what.format(teacher)
            found += _by_level(runs, numbers, teacher, key, title, unit, factor)
            found += _over_steps(runs, numbers, teacher, key, title, unit, factor)
    return found


def _by_level(
    runs: Sequence[ReportedRun],
    numbers: Mapping[str, int],
    teacher: str,
    key: str,
    title: str,
    unit: str,
    factor: float,
) -> list[Panel]:
    """Draw the first and the newest measurement of every run against the noise level."""
    lines, colours, first_ones = {}, {}, []
    for run in runs:
        moments = [(step, row) for step, row in measured(run, teacher) if key in row]
        for step, row in dict([moments[0], moments[-1]]).items() if moments else ():
            name = f"{run.name}, update {step}" if len(runs) > 1 else f"update {step}"
            lines[name] = {level["time"]: level[key] for level in row["by_time"] if key in level}
            colours[name] = numbers[run.name]
            if step != moments[-1][0]:
                first_ones.append(name)
    if not lines:
        return []
    slug = f"{key}-{teacher}-levels"
    return [by_level(slug, f"{title}, by noise level", unit, lines, colours, factor, dashed=first_ones)]


def _over_steps(
    runs: Sequence[ReportedRun],
    numbers: Mapping[str, int],
    teacher: str,
    key: str,
    title: str,
    unit: str,
    factor: float,
) -> list[Panel]:
    lines = {}
    for run in runs:
        points = [(step, row[key]) for step, row in measured(run, teacher) if key in row]
        if len(points) > 1:
            steps, values = zip(*points, strict=True)
            lines[run.name] = Series(steps=numpy.array(steps), values=numpy.array(values, dtype=float))
    slug = f"{key}-{teacher}"
    return [over_steps(slug, title, unit, lines, numbers=numbers, factor=factor)] if lines else []


def histograms(run: ReportedRun, prefix: str) -> list[Panel]:
    """Draw how likely each teacher and the student find the chunks, at the newest measurement."""
    found = []
    for teacher in teachers_of(run):
        step, last = list(measured(run, teacher))[-1]
        if last["chunks"]:
            found.append(_histogram(f"{prefix}chunks-{teacher}", teacher, step, last))
    return found


def _histogram(key: str, teacher: str, step: int, last: Measured) -> Panel:
    theirs, ours = (numpy.array(last[f"{who}_likelihoods"]) for who in ("teacher", "student"))
    edges = numpy.linspace(0, 1, len(theirs) + 1)
    up = float(last["pushed_up"])
    with drawing():
        figure, axes = new_figure()
        share = 100 / max(1, int(theirs.sum()))
        axes.bar(edges[:-1], theirs * share, width=edges[1], align="edge", **_filled(0))
        axes.stairs(ours * share, edges, **{**line_style(1), "linewidth": 2})
        axes.axvline(0.5, color=axes.spines["left"].get_edgecolor(), linewidth=1, linestyle=":")
        softened = "" if last["temperature"] == 1 else f", to the power 1/{last['temperature']:g}"
        axes.set_xlabel(f"likelihood of a chunk{softened}")
        axes.set_ylabel("% of chunks")
        axes.set_xlim(0, 1)
        legend(figure, {teacher: _filled(0) | {"linewidth": 7}, "student": line_style(1)})
    note = (
        f"{up:.1%} of {last['chunks']:,} chunks are pushed up by Reverse CALM: to the right of the dotted "
        f"line log(p / (1 - p)) of {teacher} is above 0. At update {step}."
    )
    return Panel(key=key, title=f"chunks of {teacher}", figure=figure, note=note)


def _filled(number: int) -> dict[str, Any]:
    return {"color": line_style(number)["color"], "alpha": 0.45}


def pushes(run: ReportedRun) -> str:
    """List the share pushed up by teacher, noise level and source, at the newest measurement."""
    rows = []
    for teacher in teachers_of(run):
        _, last = list(measured(run, teacher))[-1]
        places = [("all", last)]
        places += [(f"t = {level['time']:g}", level) for level in last["by_time"]]
        sources = last["by_source"]
        places += [(str(own["source"]), own) for own in sources] if len(sources) > 1 else []
        rows += [
            (
                teacher,
                place,
                f"{row['chunks']:,}",
                _percent(row.get("pushed_up")),
                _nats(row),
                _top1(row),
            )
            for place, row in places
        ]
    return table(("teacher", "where", "chunks", "pushed up", "KL", "same first id"), rows)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _nats(row: Measured) -> str:
    if "kl" in row:
        return f"{row['kl']:.4f} a token"
    return f"{row['chunk_kl']:.4f} a chunk" if "chunk_kl" in row else ""


def _top1(row: Measured) -> str:
    return _percent(row.get("top1"))
