"""Several runs beside each other: paired differences with intervals, and in what their recipes differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tide_megatron.base.errors import DataError
from tide_megatron.evaluate.plots import MARKERS
from tide_megatron.evaluate.report import (
    PairedDifference,
    TextTable,
    comparison_table,
    differences_to,
    source_table,
)
from tide_megatron.report.figure import DIM, Panel, drawing, line_style, new_figure, shortened
from tide_megatron.report.page import PageSection, table
from tide_megatron.report.reading import ReportedRun
from tide_megatron.train.resolve import Tree, difference

MOST_DIFFERENCES = 60
"""Lines of the table of recipes."""
LONGEST_VALUE = 140
"""Characters of a cell there; the whole recipes stand below."""


def differences(runs: Sequence[ReportedRun], numbers: Mapping[str, int]) -> PageSection:
    """Show paired differences of the held-out bound, where runs have ended and scored the same samples."""
    scores: dict[str, Mapping[str, Any]] = {
        run.name: run.result for run in runs if "sample_nll_per_byte" in run.result
    }
    title = f"Compared with {runs[0].name}"
    lacking = ", ".join(run.name for run in runs if run.name not in scores)
    missing = f"No scores by sample yet of {lacking}: result.json comes when a run ends." if lacking else ""
    if runs[0].name not in scores or len(scores) < 2:
        return PageSection(title=title, missing=missing)
    try:
        found_pairs = differences_to(scores, runs[0].name)
        found = comparison_table(scores, runs[0].name)
    except DataError as fault:
        return PageSection(title=title, missing=f"{fault}.")
    sources = source_table(scores)
    pairs = max((pair.pairs for pair in found_pairs.values()), default=0)
    note = (
        f"Evaluation masks the same tokens of the same samples in every run, so {pairs} samples are pairs: a "
        "difference is their mean, with a 95 % interval of Student's t. It speaks about other samples, not "
        "about other seeds."
    )
    body = _html(found) + (f"<h3>{sources.title}</h3>" + _html(sources) if sources is not None else "")
    panels = [_figure(found_pairs, runs[0].name, numbers)] if found_pairs else []
    return PageSection(
        title=title, panels=panels, body=body, note=note if found_pairs else "", missing=missing
    )


def _html(found: TextTable) -> str:
    return table(found.columns, found.rows)


def _figure(found: Mapping[str, PairedDifference], reference: str, numbers: Mapping[str, int]) -> Panel:
    with drawing():
        figure, axes = new_figure(height=1.5 + 0.42 * len(found))
        axes.axvline(0.0, color=DIM, linewidth=1.0)
        for row, (name, pair) in enumerate(found.items()):
            low, high = pair.ci95
            colour = line_style(numbers[name])["color"]
            reach = [[pair.mean - low], [high - pair.mean]] if pair.pairs > 1 else None
            marker = MARKERS[numbers[name] % len(MARKERS)]
            axes.errorbar(pair.mean, row, xerr=reach, fmt=marker, color=colour, capsize=4, linewidth=1.8)
            words = f"{pair.mean:+.4f}" + ("" if pair.is_clear else " (not clear)")
            axes.annotate(words, (pair.mean, row), xytext=(0, 7), textcoords="offset points", ha="center")
        axes.set_yticks(range(len(found)), [shortened(name, 18) for name in found])
        axes.set_ylim(len(found) - 0.5, -0.8)
        axes.margins(x=0.2)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"nats a byte, difference to {shortened(reference, 24)} (left is better)")
    return Panel(key="differences", title="held-out bound, paired differences", figure=figure)


def recipes(runs: Sequence[ReportedRun]) -> PageSection:
    """Show the keys in which recipes differ from the first run's."""
    first, *others = runs
    title, rows = "In what the recipes differ", []
    for run in others:
        for line in difference(_plain(first.tree), _plain(run.tree)):
            key, _, values = line.partition(": ")
            rows.append((run.name, key, shortened(values, LONGEST_VALUE)))
    kept = rows[:MOST_DIFFERENCES]
    note = f"Of {len(rows)} differences the first {len(kept)}." if len(kept) < len(rows) else ""
    body = table(("run", "key", f"{first.name} -> run"), kept, long=(1, 2))
    return PageSection(
        title=title, body=body or "<p>The recipes are the same but for their folders.</p>", note=note
    )


def _plain(tree: Tree) -> Tree:
    """Return a recipe without the place that it was written to."""
    return {key: value for key, value in tree.items() if key != "folder"}
