"""Tables of a report: how runs stand, their phases and starts, the data's chunks, task scores."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from tide_megatron.base.errors import TideError
from tide_megatron.base.units import in_bytes, in_time
from tide_megatron.data.manifest import in_share, read_manifest
from tide_megatron.report.page import table
from tide_megatron.report.reading import ReportedRun

MOST_STARTS = 50
GOOD = ("training", "finished")


def head(runs: Sequence[ReportedRun], title: str, written_at: str) -> str:
    """Return what stands above all sections: how each run stands, and what is missing of it."""
    parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="small dim">written {html.escape(written_at)}</p>']
    for run in runs:
        status, kind = run.status, "good" if run.status.state in GOOD else "bad"
        told, steps = status.told, run.tree.get("steps")
        course = run.train.get("loss")
        step = told.step if told else None if course is None else int(course.steps.max())
        words = "" if step is None else f", update {step}" + (f" of {steps}" if steps else "")
        why = f" ({html.escape(status.why)})" if status.why else ""
        parts.append(
            f"<p><b>{html.escape(run.name)}</b>: <span class={kind}>{html.escape(status.state)}</span>{why}"
            f"{words}"
            f' <span class="dim small">{html.escape(_facts(run))}</span></p>'
        )
        parts += [
            f'<p class="missing">{html.escape(run.name)}: {html.escape(note)}</p>' for note in run.notes
        ]
    return "".join(parts)


def _facts(run: ReportedRun) -> str:
    words = [f"{run.records:,} records"]
    if run.ranks is not None:
        words.append(f"{run.ranks} rank{'s' * (run.ranks > 1)}")
    if run.recipe is not None:
        words.append(" + ".join(f"{kind.weight:g} {name}" for name, kind in run.recipe.terms.items()))
    seconds, starts = (run.result.get(f"total_{name}") for name in ("seconds", "starts"))
    if isinstance(seconds, float | int) and isinstance(starts, float | int):
        words.append(f"trained {in_time(seconds)} in {starts:.0f} start{'s' * (starts > 1)}")
    return "; ".join(words)


def phases(runs: Sequence[ReportedRun]) -> str:
    """Return the share of the time by phase, over each whole run."""
    shares = {run.name: _shares(run) for run in runs}
    names = sorted(
        {name for found in shares.values() for name in found},
        key=lambda name: -max(found.get(name, 0.0) for found in shares.values()),
    )
    if not names:
        return ""
    cells = "".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(
            f"<td>{found.get(name, 0.0):.1%} "
            f'<span class="bar" style="width:{8 * found.get(name, 0.0):.2f}rem"></span></td>'
            for found in shares.values()
        )
        + "</tr>"
        for name in names
    )
    titles = "".join(f"<th>{html.escape(name)}</th>" for name in shares)
    return (
        "<h3>where the time of rank 0 went</h3>"
        f'<div class="wide"><table><tr><th>phase</th>{titles}</tr>{cells}</table></div>'
    )


def _shares(run: ReportedRun) -> dict[str, float]:
    """Weigh each record's shares by its seconds."""
    seconds = run.train.get("seconds")
    if seconds is None:
        return {}
    total = float(seconds.values.sum()) or 1.0
    of_step = dict(zip(seconds.steps.tolist(), seconds.values.tolist(), strict=True))
    return {
        name: sum(
            share * of_step.get(step, 0.0)
            for step, share in zip(series.steps.tolist(), series.values.tolist(), strict=True)
        )
        / total
        for name, series in run.named("phase/").items()
    }


def peaks(runs: Sequence[ReportedRun]) -> str:
    """Return the most memory by phase, where a GPU's allocator told it."""
    rows = [
        (name, *(in_bytes(float(run.named("peak_bytes/")[name].values.max())) for run in runs))
        for name in (runs[0].named("peak_bytes/") if runs else {})
        if all(name in run.named("peak_bytes/") for run in runs)
    ]
    return table(("most memory of rank 0 in", *(run.name for run in runs)), rows)


def starts(run: ReportedRun) -> str:
    """Return every start and how it ended, the newest first."""
    rows = []
    for start in list(reversed(run.status.starts))[:MOST_STARTS]:
        lost = "" if start.lost is None else str(start.lost)
        job = f"{start.job} (restart {start.restarts})" if start.restarts else start.job
        took = "" if start.startup_seconds is None else in_time(start.startup_seconds)
        rows.append(
            (
                *(start.at.replace("T", " "), str(start.step), lost, str(start.ranks), start.host, job),
                *(took, start.end or "no word", start.why),
            )
        )
    head_ = ("began", "from update", "lost", "ranks", "host", "job", "first update after", "ended", "why")
    left = len(run.status.starts) - len(rows)
    more = f'<p class="small dim">{left} earlier starts are not listed.</p>' if left > 0 else ""
    return table(head_, rows, long=(8,)) + more


def coverage(runs: Sequence[ReportedRun]) -> tuple[str, str]:
    """Return how well each teacher's own tokens align with the student's, and what could not be read."""
    rows, missing = [], []
    for folder in dict.fromkeys(folder for run in runs for folder in _data(run)):
        try:
            manifest = read_manifest(Path(folder))
        except TideError as fault:
            missing.append(f"{fault}.")
            continue
        for name, side in manifest.sides.items():
            rows.append(
                (
                    *(
                        "/".join(Path(folder).parts[-2:]),
                        name,
                        in_share(side.share_of(manifest.statistics.reply_bytes)),
                    ),
                    *(f"{side.chunks:,}", f"{side.pairs:,}"),
                    f"{side.without_chunks:,} of {manifest.samples:,}",
                )
            )
    names = ("data", "side", "reply bytes in chunks", "chunks", "of one equal id", "samples without chunks")
    return table(names, rows), " ".join(missing)


def _data(run: ReportedRun) -> Iterator[str]:
    if run.recipe is not None:
        yield from run.recipe.data.folders.values()
        if run.recipe.data.held_out is not None:
            yield run.recipe.data.held_out


def recipe_text(run: ReportedRun) -> str:
    """Return the recipe, folded."""
    if not run.tree:
        return ""
    text = html.escape(yaml.safe_dump(run.tree, sort_keys=False, allow_unicode=True))
    return f"<details><summary>recipe of {html.escape(run.name)}</summary><pre>{text}</pre></details>"
