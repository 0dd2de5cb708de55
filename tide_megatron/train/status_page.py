"""The page of a run: one HTML file that loads itself anew, with nothing from elsewhere.

It says when it was written. A run that was killed leaves its page behind, so the page itself counts how long
nothing new has come, and says so after a while.
"""

from __future__ import annotations

import html
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tide_megatron.base.units import in_bytes, in_time

REFRESH_SECONDS = 10
SILENT_SECONDS = 120
"""After so long without a word the page of a training run warns."""
MOST_RANKS = 32
"""In the table by rank; of more, those furthest from the median."""
WIDTH, HEIGHT, MARGIN = 520, 200, 44

_STYLE = """
:root { color-scheme: light dark;
  --line: #8884; --dim: #888; --good: #2a7d4f; --bad: #b3402e; --ink: #3b6fb6 }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 1.5rem auto; padding: 0 1rem }
h1 { font-size: 1.25rem; margin: 0 } h2 { font-size: 1rem; margin: 1.6rem 0 .4rem }
.state { font-weight: 600 } .good { color: var(--good) } .bad { color: var(--bad) } .dim { color: var(--dim) }
progress { width: 100%; height: .8rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .15rem .7rem .15rem 0; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child, td.text, th.text { text-align: left }
dl.facts { columns: 22rem; margin: 0 } dl.facts div { display: flex; justify-content: space-between;
  border-bottom: 1px solid var(--line); break-inside: avoid } dd { margin: 0; text-align: right }
.row { display: flex; flex-wrap: wrap; gap: 1.5rem } .wide { overflow-x: auto }
svg text { fill: var(--dim); font-size: 11px } svg path { fill: none; stroke: var(--ink); stroke-width: 1.5 }
svg line { stroke: var(--line) }
"""
_SCRIPT = """
const told = Date.parse(document.body.dataset.told), note = document.getElementById('silent');
const say = () => {
  const seconds = Math.round((Date.now() - told) / 1000);
  if (document.body.dataset.live && seconds > SILENT)
    note.textContent = `nothing new for ${Math.floor(seconds / 60)} min: tide status tells whether it lives`;
};
if (told) { say(); setInterval(say, 1000); }
"""


def render(status: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        status: `train.status.RunStatus.values()`.
    """
    told = status["told"] or {}
    is_live = status["state"] == "training"
    refresh = f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">' if is_live else ""
    name = html.escape(str(status["folder"]))
    parts = [
        _head(status, told),
        _facts(status, told),
        '<div class="row">'
        + "".join(_plot(title, told.get("curves", {}).get(key, ())) for key, title in _CURVES.items())
        + "</div>",
        _ranks(told),
        _starts(status["starts"]),
        _startup(status["starts"]),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{refresh}<title>{name}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f'<body data-told="{html.escape(str(told.get("at", "")))}" data-live="{"yes" if is_live else ""}">'
        f"<h1>{name}</h1>{''.join(parts)}"
        f"<script>{_SCRIPT.replace('SILENT', str(SILENT_SECONDS))}</script></body></html>\n"
    )


_CURVES = {"loss": "loss", "nll_per_byte": "held out, nats a byte"}
_GOOD = ("training", "finished")


def _head(status: Mapping[str, Any], told: Mapping[str, Any]) -> str:
    """Show state, reason and progress."""
    kind = "good" if status["state"] in _GOOD else "bad"
    why = f" ({html.escape(status['why'])})" if status["why"] else ""
    line = f'<p><span class="state {kind}">{status["state"]}</span>{why} '
    line += '<span id="silent" class="bad"></span></p>'
    if not told:
        return line
    step, steps = told["step"], told["steps"]
    eta = told.get("eta_seconds")
    left = f", {in_time(eta)} to go" if eta and status["state"] == "training" else ""
    skipped = f", {told['skipped']} updates skipped" if told.get("skipped") else ""
    return (
        f'{line}<progress max="{steps}" value="{step}"></progress>'
        f"<p>step {step} of {steps}{left}{skipped} "
        f'<span class="dim">as of {html.escape(told["at"])}</span></p>'
    )


def _facts(status: Mapping[str, Any], told: Mapping[str, Any]) -> str:
    """Show the last record's values, and where the run stands on disk."""
    facts = {name: value for name, value in told.get("train", {}).items() if not name.startswith(_HIDDEN)}
    scores = {name: value for name, value in told.get("scores", {}).items() if "/" not in name}
    facts |= {f"held out: {name}": value for name, value in scores.items()}
    rows = [(name, _number(name, value)) for name, value in facts.items() if value is not None]
    if status["checkpoint"]:
        rows.append(("newest checkpoint", status["checkpoint"]))
        rows.append(("its age", in_time(status["checkpoint_seconds"])))
    cells = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd></div>" for name, text in rows
    )
    return f'<h2>now</h2><dl class="facts">{cells}</dl>' if rows else ""


_HIDDEN = ("phase/", "bytes/", "items/", "peak_bytes/")
"""Beginnings of names that are many, and told elsewhere."""


def _number(name: str, value: float) -> str:
    return in_bytes(value) if name.endswith("_bytes") else f"{value:.4g}"


def _plot(title: str, points: Sequence[Sequence[float]]) -> str:
    """Draw a curve over steps; less than two points are none."""
    if len(points) < 2:
        return ""
    steps, values = [point[0] for point in points], [point[1] for point in points]
    low, high, first, last = min(values), max(values), steps[0], steps[-1]
    across, up = max(1, last - first), (high - low) or 1.0
    marks = " L".join(
        f"{MARGIN + (step - first) / across * (WIDTH - MARGIN - 8):.1f},"
        f"{8 + (high - value) / up * (HEIGHT - 32):.1f}"
        for step, value in zip(steps, values, strict=True)
    )
    bottom = HEIGHT - 24
    return (
        f'<figure style="margin:0"><h2>{title}</h2><svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'role="img" aria-label="{title} over steps"><line x1="{MARGIN}" y1="{bottom}" x2="{WIDTH - 8}" '
        f'y2="{bottom}"/><path d="M{marks}"/><text x="0" y="16">{high:.4g}</text>'
        f'<text x="0" y="{bottom}">{low:.4g}</text><text x="{MARGIN}" y="{HEIGHT - 6}">{first}</text>'
        f'<text x="{WIDTH - 8}" y="{HEIGHT - 6}" text-anchor="end">step {last}</text></svg></figure>'
    )


def chosen_ranks(rank_seconds: Sequence[Sequence[float]]) -> list[int]:
    """Return the ranks to show: all, or those whose phases lie furthest from the median rank's."""
    if len(rank_seconds) <= MOST_RANKS:
        return list(range(len(rank_seconds)))
    middle = [statistics.median(column) for column in zip(*rank_seconds, strict=True)]
    apart = [sum(abs(a - b) for a, b in zip(row, middle, strict=True)) for row in rank_seconds]
    return sorted(sorted(range(len(apart)), key=lambda rank: -apart[rank])[:MOST_RANKS])


def _ranks(told: Mapping[str, Any]) -> str:
    """Show seconds by phase of each rank, in the time of the last record."""
    seconds, hosts = told.get("rank_seconds") or (), told.get("hosts") or ()
    if not seconds:
        return ""
    shown = chosen_ranks(seconds)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in told["phases"])
    rows = "".join(
        f'<tr><td>{rank}</td><td class="text">{html.escape(hosts[rank]) if rank < len(hosts) else ""}</td>'
        + "".join(f"<td>{value:.2f}</td>" for value in seconds[rank])
        + "</tr>"
        for rank in shown
    )
    of = "" if len(shown) == len(seconds) else f" (of {len(seconds)}, those furthest from the median)"
    return (
        f'<h2>seconds by phase of each rank{of}</h2><div class="wide"><table><tr><th>rank</th>'
        f'<th class="text">host</th>{head}</tr>{rows}</table></div>'
    )


def _starts(starts: Sequence[Mapping[str, Any]]) -> str:
    """Show every start, the newest first."""
    place = ("began", "from step", "lost", "ranks", "first rank's host", "job")
    names = (*place, "first update after", "ended", "how", "why")
    head = "".join(f'<th class="text">{name}</th>' for name in names)
    rows = ""
    for start in reversed(starts):
        job = f"{start['job']} (restart {start['restarts']})" if start["restarts"] else start["job"]
        lost = "" if start["lost"] is None else start["lost"]
        took = start.get("startup_seconds")
        cells = (
            *(start["at"], start["step"], lost, start["ranks"], start["host"], job),
            *("" if took is None else in_time(took), start["ended_at"], start["end"] or "", start["why"]),
        )
        rows += (
            "<tr>" + "".join(f'<td class="text">{html.escape(str(cell))}</td>' for cell in cells) + "</tr>"
        )
    return f'<h2>starts</h2><div class="wide"><table><tr>{head}</tr>{rows}</table></div>' if rows else ""


def _startup(starts: Sequence[Mapping[str, Any]]) -> str:
    """Show where the time went until the first update of the last start."""
    parts = starts[-1].get("startup") if starts else None
    if not parts:
        return ""
    rows = "".join(
        f'<tr><td class="text">{html.escape(name)}</td><td>{seconds:.2f}</td><td>{rank}</td></tr>'
        for name, (seconds, rank) in parts.items()
    )
    return (
        "<h2>before the first update of the last start</h2><table>"
        f'<tr><th class="text">part</th><th>seconds</th><th>longest on rank</th></tr>{rows}</table>'
    )
