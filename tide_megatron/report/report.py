"""Write the report of one run or several: a page, and its figures as PNGs beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tide_megatron.base.disk import disk_faults
from tide_megatron.base.errors import ConfigError
from tide_megatron.base.files import write_text
from tide_megatron.base.units import now
from tide_megatron.report import curves, facts, teacher_agreement
from tide_megatron.report.comparison import differences, recipes
from tide_megatron.report.layout_picture import layout_picture
from tide_megatron.report.page import PageSection, document
from tide_megatron.report.reading import ReportedRun, read_runs
from tide_megatron.report.surface import surfaces
from tide_megatron.report.task_results import tasks

PAGE = "report.html"
MOST_RUNS = 12
"""On one page."""


def write_report(folders: Sequence[Path], out: Path, *, pngs: bool = True) -> Path:
    """Write the page of some runs, and its figures.

    Args:
        folders: of the runs; differences are to the first.
        out: folder to write into; made where it is missing.
        pngs: also write every figure as a PNG.

    Returns:
        The page.

    Raises:
        TideError: no runs, too many, a folder that is no run's, or a disk that refuses.
    """
    if not 1 <= len(folders) <= MOST_RUNS:
        raise ConfigError(f"{len(folders)} runs: name 1 to {MOST_RUNS} run folders")
    runs = read_runs(folders)
    found = sections(runs)
    title = ", ".join(run.name for run in runs)
    with disk_faults(out, ConfigError):
        out.mkdir(parents=True, exist_ok=True)
        page = document(title, facts.head(runs, title, now()), found)
        write_text(out / PAGE, page, is_durable=False)
        for panel in (panel for section in found for panel in section.panels if pngs):
            panel.write(out)
    return out / PAGE


def sections(runs: Sequence[ReportedRun]) -> list[PageSection]:
    """Return all parts of the page: what runs share first, then what belongs to each."""
    numbers = {run.name: number for number, run in enumerate(runs)}
    several = len(runs) > 1
    found = [
        *([differences(runs, numbers)] if several else []),
        tasks(runs, numbers),
        _held_out(runs, numbers),
        PageSection(title="Losses", panels=curves.losses(runs, numbers)),
        _agreement(runs, numbers),
    ]
    for number, run in enumerate(runs):
        prefix, of = ("", "") if not several else (f"run{number + 1}-", f" of {run.name}")
        found += [_mixtures(run, prefix, of), _gradients(run, prefix, of), _chunks(run, prefix, of)]
    found += [_coverage(runs), _speed(runs, numbers)]
    for run in runs:
        of = f" of {run.name}" if several else ""
        picture, missing = layout_picture(run)
        note = (
            "Boxes are models from the first layer to the last, attention on the left, feed-forward layers "
            "or experts on the right; filled is what the rank holds."
        )
        found.append(
            PageSection(title=f"Layout{of}", body=picture, missing=missing, note=note if picture else "")
        )
        found.append(PageSection(title=f"Starts{of}", body=facts.starts(run), missing=_no_starts(run)))
    found += [recipes(runs)] if several else []
    found.append(
        PageSection(title="Recipe" + "s" * (len(runs) > 1), body="".join(map(facts.recipe_text, runs)))
    )
    return found


def _held_out(runs: Sequence[ReportedRun], numbers: Mapping[str, int]) -> PageSection:
    panels = curves.held_out(runs, numbers)
    missing = (
        ""
        if panels
        else (
            "No held-out scores yet: they come at the end, and every evaluation.every updates, where "
            "data.held_out is set."
        )
    )
    return PageSection(title="Held-out scores", panels=panels, missing=missing)


def _agreement(runs: Sequence[ReportedRun], numbers: Mapping[str, int]) -> PageSection:
    """Show how far students are from their teachers; nothing for runs without teachers."""
    panels = teacher_agreement.agreement(runs, numbers)
    missing = ""
    if not panels and any(run.tree.get("teachers") for run in runs):
        missing = "Not recorded: set evaluation.agreement=64 (samples that teachers are asked about)."
    note = (
        "Held-out tokens, masked alike at every moment and in every run. Dashed: the first measurement. A "
        "smaller KL is a student that says what its teacher says, which need not be what is right."
    )
    return PageSection(
        title="Agreement with teachers", panels=panels, missing=missing, note=note if panels else ""
    )


def _mixtures(run: ReportedRun, prefix: str, of: str) -> PageSection:
    return PageSection(title=f"Lambda{of}", panels=surfaces(run, prefix))


def _gradients(run: ReportedRun, prefix: str, of: str) -> PageSection:
    panels = curves.gradients(run, prefix)
    missing = "" if panels else "Not recorded: set metrics.gradients_every=50 (updates between measurements)."
    note = (
        "At the head's input: the student's hidden rows after the final norm. Above 0 a term pulls the rows "
        "where the gold tokens do."
    )
    return PageSection(
        title=f"Gradients of the terms{of}", panels=panels, missing=missing, note=note if panels else ""
    )


def _chunks(run: ReportedRun, prefix: str, of: str) -> PageSection:
    """Show chunk likelihoods; nothing for a run without teachers."""
    panels = teacher_agreement.histograms(run, prefix)
    missing = ""
    if not panels and run.tree.get("teachers"):
        missing = "Not recorded: set evaluation.agreement=64 (samples that teachers are asked about)."
    return PageSection(
        title=f"Chunk likelihoods{of}", panels=panels, body=teacher_agreement.pushes(run), missing=missing
    )


def _coverage(runs: Sequence[ReportedRun]) -> PageSection:
    body, missing = facts.coverage(runs)
    return PageSection(title="Chunk coverage of the data", body=body, missing=missing)


def _speed(runs: Sequence[ReportedRun], numbers: Mapping[str, int]) -> PageSection:
    body = facts.phases(runs) + facts.peaks(runs)
    has_peak = any("mfu" in run.train for run in runs)
    missing = (
        ""
        if has_peak or not body
        else ("No MFU: the peak of these devices is not known; metrics.peak_tflops sets it.")
    )
    return PageSection(
        title="Speed and memory", panels=curves.speed(runs, numbers), body=body, missing=missing
    )


def _no_starts(run: ReportedRun) -> str:
    return "" if run.status.starts else "No start is on record."
