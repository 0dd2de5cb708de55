"""What models can do: greedy replies to held-out exercises, marked right or wrong, with intervals.

All models answer the same questions, so two of them are compared question by question. Intervals are over
questions: they say nothing about other seeds or base models.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exercise_data import TASK

from tide_megatron.decode.ranks import answer_prompts
from tide_megatron.evaluate.report import TextTable
from tide_megatron.launch.ranks import run_ranks
from tide_megatron.tasks.exercises import KINDS
from tide_megatron.tasks.scores import MeanScore, compare
from tide_megatron.tasks.task import judge_all

KIND_NAMES = tuple(kind.__name__ for kind in KINDS)
QUESTIONS = {question.name: question for question in TASK.questions()}
"""By their text, which is what users ask."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """A model's replies to all questions of the task."""

    replies: Mapping[str, str]
    """Question -> reply."""
    scores: Mapping[str, float]
    """Question -> 1.0 right or 0.0 wrong."""

    @classmethod
    def of(cls, folder: Path, every: int = 1) -> Answers:
        """Let the model of a folder answer every so many-th question, on one CPU rank.

        That takes seconds; more ranks would take longer to start.
        """
        prompts = list(QUESTIONS)[::every]
        replies = run_ranks(answer_prompts, (folder, prompts, TASK.decoding), 1, "cpu")
        return marked({prompt: reply.text for prompt, reply in zip(prompts, replies, strict=True)})

    def summary(self) -> dict[str, Any]:
        """Return what result files and cards hold of it."""
        score = MeanScore.of(list(self.scores.values()))
        return {
            "exact_match": score.mean,
            "exact_match_ci95": [score.low, score.high],
            "questions": score.questions,
            "exact_match_by_kind": {kind: self.of_kind(kind) for kind in KIND_NAMES},
        }

    def of_kind(self, kind: str) -> float:
        """Return the share that is right of one kind of question."""
        return statistics.mean(
            score for name, score in self.scores.items() if QUESTIONS[name].data["kind"] == kind
        )


def marked(replies: Mapping[str, str]) -> Answers:
    """Judge replies to questions of the task."""
    judged = judge_all(TASK, [(QUESTIONS[name], reply) for name, reply in replies.items()])
    scores = {name: verdict.score for name, verdict in zip(replies, judged, strict=True)}
    return Answers(replies=replies, scores=scores)


def score_table(answered: Mapping[str, Answers], reference: str, costs: Mapping[str, float]) -> TextTable:
    """Compare models by exact match.

    Args:
        answered: model -> its answers, in the order of the table.
        reference: the model that differences are taken to.
        costs: CPU seconds of those that were trained here.
    """
    rows = []
    for name, answers in answered.items():
        score = MeanScore.of(list(answers.scores.values()))
        words = "reference"
        if name != reference:
            found = compare(answers.scores, answered[reference].scores).difference
            words = f"{100 * found.mean:+.1f} [{100 * found.ci95[0]:+.1f}, {100 * found.ci95[1]:+.1f}]"
        cost = f"{costs[name]:.0f}" if name in costs else ""
        rows.append((name, score.percent(), words, cost))
    columns = ("model", "right, %", f"points to {reference}", "CPU s")
    return TextTable(
        title="What they can do: exact match of greedy replies", columns=columns, rows=tuple(rows)
    )


def kind_table(answered: Mapping[str, Answers]) -> TextTable:
    """Compare models kind by kind, in percent."""
    rows = [
        (name, *(f"{100 * answers.of_kind(kind):.1f}" for kind in KIND_NAMES))
        for name, answers in answered.items()
    ]
    title = f"Exact match by kind of exercise, % of {TASK.count // len(KIND_NAMES)} each"
    return TextTable(title=title, columns=("model", *KIND_NAMES), rows=tuple(rows))


def reply_table(title: str, names: Sequence[str], answered: Mapping[str, Answers]) -> TextTable:
    """Show questions with their answers and the models' replies, right and wrong ones marked."""
    rows = []
    for name in names:
        marks = (
            f"{'✓' if answers.scores[name] else '✗'} {answers.replies[name]}" for answers in answered.values()
        )
        rows.append((name, QUESTIONS[name].data["answer"], *marks))
    return TextTable(title=title, columns=("question", "answer", *answered), rows=tuple(rows))


def first_of_each_kind() -> list[str]:
    """Return the first question of each kind."""
    firsts = {question.data["kind"]: name for name, question in reversed(QUESTIONS.items())}
    return [firsts[kind] for kind in KIND_NAMES]


def where_they_differ(one: Answers, other: Answers, most: int) -> list[str]:
    """Return the first questions that one of two models answers right and the other one wrong."""
    return [name for name in one.scores if one.scores[name] != other.scores[name]][:most]


def write_answers(answered: Mapping[str, Answers], file: Path) -> None:
    """Write every model's reply to every question, a question a line."""
    with file.open("w", encoding="utf-8") as lines:
        for name, question in QUESTIONS.items():
            replies = {model: answers.replies[name] for model, answers in answered.items()}
            told = {"question": name, "answer": question.data["answer"], "replies": replies}
            lines.write(json.dumps(told, ensure_ascii=False) + "\n")
