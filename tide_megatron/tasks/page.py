"""Results as tables: a model's scores beside the paper's, and two models by question, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tide_megatron.evaluate.report import TextTable
from tide_megatron.tasks.scores import MeanScore, wilson
from tide_megatron.tasks.suite import Published, Suite, published_of

PAPER = "arXiv 2604.26951, table 1"
ABLATION = (
    "The paper's ablation (its table 2: averages of 32.88 to 33.14 over the eight tasks, a spread of 0.26, "
    "one run each) cannot be told apart by such scores: one problem of HumanEval alone is 0.61 points, and "
    "the standard error of its score near 48 % is 3.9."
)
INTERVALS = (
    "Brackets are 95 % intervals over questions (Wilson's where an answer is right or wrong): they say "
    "nothing of other seeds, training runs or prompts."
)


def score_table(results: Mapping[str, Mapping[str, Any]], published: Mapping[str, Published]) -> TextTable:
    """Return a model's scores, with the paper's beside them where there are any.

    Args:
        results: task -> its result.
        published: task -> what the paper reports of it.
    """
    models = list(dict.fromkeys(name for one in published.values() for name in one.scores))
    rows = []
    for name, result in results.items():
        score = MeanScore(
            mean=result["score"],
            low=result["interval"][0],
            high=result["interval"][1],
            questions=result["questions"],
        )
        less, none = result.get("less_room", 0), result.get("no_room", 0)
        cells = [name, str(score.questions), score.percent(), f"{less} / {none}"]
        cells += [_published(published.get(name), model) for model in models]
        rows.append(tuple(cells))
    columns = ("task", "questions", "score, %", "less / no room", *models)
    return TextTable(
        title=f"Scores{f' (right: {PAPER})' if models else ''}", columns=columns, rows=tuple(rows)
    )


def _published(one: Published | None, model: str) -> str:
    if one is None or model not in one.scores:
        return ""
    share = one.scores[model] / 100
    low, high = wilson(share, one.questions)
    return MeanScore(mean=share, low=low, high=high, questions=one.questions).percent()


def comparison_table(comparisons: Mapping[str, Mapping[str, Any]], other: str) -> TextTable:
    """Return paired differences to another folder of results.

    Args:
        comparisons: task -> `PairedScores.summary`.
        other: the folder's name.
    """
    rows = []
    for name, one in comparisons.items():
        low, high = (100 * end for end in one["interval"])
        rows.append(
            (
                name,
                str(one["questions"]),
                f"{100 * one['difference']:+.1f} [{low:+.1f}, {high:+.1f}]",
                f"{one['better']} / {one['worse']}",
                f"{one['sign_test']:.2g}",
            )
        )
    columns = ("task", "questions of both", "difference, points", "better / worse", "sign test p")
    return TextTable(title=f"Compared with {other}, question by question", columns=columns, rows=tuple(rows))


def notes(results: Mapping[str, Mapping[str, Any]], published: Mapping[str, Published]) -> list[str]:
    """Return what a reader of the table has to know."""
    found = [INTERVALS]
    short = {name: one for name, one in results.items() if one.get("less_room") or one.get("no_room")}
    for name, one in short.items():
        found.append(
            f"{name}: {one['less_room']} prompts left fewer new tokens than were asked for within the "
            f"model's window of {one['window']}, {one['no_room']} left none and count as wrong."
        )
    for name, one in results.items():
        if one.get("likelihood"):
            found.append(_likelihood(name, one["likelihood"]))
        if one.get("cut_contexts"):
            found.append(
                f"{name}: the text before {one['cut_contexts']} choices was cut on the left to fit "
                "the window."
            )
    return [*found, ABLATION] if published else found


def _likelihood(name: str, facts: Mapping[str, Any]) -> str:
    return (
        f"{name}: likelihoods are bounds estimated from {facts['draws']} maskings each, with a standard "
        f"error of {facts['standard_error']:.2g} nats on average; the two best choices of "
        f"{facts['unsure_share']:.0%} of the questions are less than two standard errors apart."
    )


def tables(found: Mapping[str, Any], suite: Suite, other: str) -> tuple[list[TextTable], list[str]]:
    """Return an evaluation's results as tables, and what a reader has to know of them.

    Args:
        found: by `evaluate_tasks`.
        suite: what was evaluated.
        other: the name of the folder of results that it is compared with.
    """
    published = {}
    for entry in suite.entries:
        if (one := entry.published or published_of(entry.task)) is not None:
            published[entry.name] = one
    shown = [score_table(found["tasks"], published)]
    if found["compared"] is not None:
        shown.append(comparison_table(found["compared"], other))
    return shown, notes(found["tasks"], published)


def markdown(tables: Sequence[TextTable], lines: Sequence[str]) -> str:
    """Return tables and notes as one Markdown page."""
    parts = ["# Evaluation"]
    for table in tables:
        parts += [f"## {table.title}", table.markdown()]
    return "\n\n".join([*parts, *lines]) + "\n"
