"""Task scores, where there are any: of a finished student, and while it trained.

A folder of results (`tide evaluate RUN --tasks ... --out RUN/evaluation`) that lies in the run's own is read:
`result.json` has `tasks`: name -> `score` and `interval` from 0 to 1, `questions`; `TASK/scores.json` has
each question's score, which pairs two runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tide_megatron.base.read import json_of
from tide_megatron.evaluate.report import PairedDifference, paired_difference
from tide_megatron.report.curves import by_run, over_steps
from tide_megatron.report.figure import Panel
from tide_megatron.report.page import PageSection, table
from tide_megatron.report.reading import ReportedRun

Results = Mapping[str, Mapping[str, Any]]
"""Task -> its result."""


def tasks(runs: Sequence[ReportedRun], numbers: Mapping[str, int]) -> PageSection:
    """Show the scores of all runs; nothing where there are none."""
    results = {run.name: _results(run.folder) for run in runs}
    names = sorted({task for found in results.values() for task in found})
    rows = [(task, *(_words(results[run.name].get(task)) for run in runs)) for task in names]
    body = table(("task", *(run.name for run in runs)), rows)
    differences = [
        (task, run.name, *_difference(pair))
        for task in names
        for run in runs[1:]
        if (pair := _paired(run.folder, runs[0].folder, task)) is not None
    ]
    if differences:
        body += f"<h3>paired differences in points, 95 % intervals over questions</h3>{_table(differences)}"
    note = (
        "Percent of the questions, with a 95 % interval: other questions, not other seeds." if names else ""
    )
    return PageSection(title="Tasks", panels=_in_training(runs, numbers), body=body, note=note)


def _difference(pair: PairedDifference) -> tuple[str, str, str]:
    low, high = (100 * end for end in pair.ci95)
    words = f"{100 * pair.mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    return words, str(pair.pairs), "" if pair.is_clear else "not clear"


def _table(rows: Sequence[Sequence[str]]) -> str:
    return table(("task", "run, to the first", "difference", "questions", ""), rows)


def _in_training(runs: Sequence[ReportedRun], numbers: Mapping[str, int]) -> list[Panel]:
    """Draw the scores that runs asked their students for while they trained."""
    names = dict.fromkeys(name for run in runs for name in run.tasks)
    return [
        over_steps(
            name.replace("/", "-"),
            f"{name.removeprefix('tasks/')} in training",
            "% of questions",
            by_run(runs, name, lambda run: run.tasks),
            numbers=numbers,
            factor=100.0,
        )
        for name in names
    ]


def _results(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Return the tasks' results in a run's folder; a file that is none of ours is passed over."""
    found: dict[str, Mapping[str, Any]] = {}
    for file in sorted(folder.glob("*/result.json")):
        try:
            said = json_of(file)
        except (OSError, ValueError):
            continue
        of_tasks = said.get("tasks") if isinstance(said, dict) else None
        for name, result in of_tasks.items() if isinstance(of_tasks, dict) else ():
            if isinstance(result, dict) and isinstance(result.get("score"), float | int):
                found[str(name)] = result
    return found


def _words(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return ""
    words = f"{100 * result['score']:.1f}"
    match result.get("interval"):
        case [float() | int() as low, float() | int() as high]:
            words += f" [{100 * low:.1f}, {100 * high:.1f}]"
    return words + (f" of {result['questions']}" if "questions" in result else "")


def _paired(one: Path, other: Path, task: str) -> PairedDifference | None:
    """Compare two runs on the questions of a task that both answered."""
    mine, theirs = _scores(one, task), _scores(other, task)
    shared = [name for name in mine if name in theirs]
    if not shared:
        return None
    return paired_difference([mine[name] for name in shared], [theirs[name] for name in shared])


def _scores(folder: Path, task: str) -> dict[str, float]:
    for file in sorted(folder.glob("*/*/scores.json")):
        if file.parent.name == task:
            try:
                return {str(name): float(score) for name, score in json_of(file).items()}
            except (OSError, ValueError, TypeError, AttributeError):
                continue
    return {}
