"""The quickstart: two teachers in two layouts teach a small student on 4 CPU ranks, and what it can do then.

    make quickstart            (or: python examples/exercises/run.py)
    make quickstart-full       each teacher alone, TIDAL beside KL, chats without mistakes, and three seeds

The student answers exercises (sums, sorting, reversing, rewriting) that it has not seen; a reply is right or
wrong. What it goes on to learn from are chats of which every third has a wrong answer; the teachers have seen
right ones. The same base student is continued at equal steps, tokens, seed and learning rate: undistilled
(cross-entropy), hard twin (no teacher, but the weight of the distilling terms on the chats' tokens),
distilled (a KL term for each teacher); and once undistilled for as much CPU time as the distilled one took.
On the ranks where the student trains data-parallel live a LLaDA2-type mixture of experts, its experts spread
over all four, and a dense Qwen3-type model cut in two pipeline stages of two tensor ranks. Writes
runs/quickstart/result.json, report.md, answers.jsonl and plots.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rich
import typer

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
from comparison import LONGER, SEEDS, Comparison, Teacher, hard_twin
from exercise_data import MODELS, ensure_exercises
from scoring import (
    Answers,
    first_of_each_kind,
    kind_table,
    reply_table,
    score_table,
    where_they_differ,
    write_answers,
)

from tide_megatron.base.log import start_log
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate.report import PairedDifference, TextTable
from tide_megatron.parallel.layout import Layout
from tide_megatron.tasks.scores import compare

CONTEXT = Context(kind="block_diffusion", block_size=8)
DATA, OUT = Path("runs/exercises-data"), Path("runs/quickstart")
STUDENT = MODELS / "student"
BASE, TAUGHT = "base student", "distilled"
WEIGHT = 8.0
"""Of all KL terms together and of their hard twin; chosen on the dev split (docs/log.md)."""
DIFFERING = 8
"""So many questions that one of two students answers right are shown."""
MOE = Teacher(name="moe", folder=MODELS / "moe", data=DATA / "test", layout=Layout(expert=4), context=CONTEXT)
DENSE = Teacher(
    name="dense",
    folder=MODELS / "dense",
    data=DATA / "test",
    layout=Layout(tensor=2, pipeline=2),
    context=CONTEXT,
)
BOTH = [word for one in (MOE, DENSE) for word in one.listen("kl", WEIGHT / 2, "temperature=1")]
RUNS = {"undistilled": [], "hard_twin": hard_twin(WEIGHT), TAUGHT: BOTH}
CLEAN = f"data.train={DATA / 'train'}"
"""The same chats without mistakes."""
FULL = {
    "moe": MOE.listen("kl", WEIGHT, "temperature=1"),
    "dense": DENSE.listen("kl", WEIGHT, "temperature=1"),
    "both_tidal": [
        word for one in (MOE, DENSE) for word in one.listen("tidal", WEIGHT, "axes=training_only")
    ],
    **{f"{name}_clean": [*words, CLEAN] for name, words in RUNS.items()},
}


def main(full: bool = False) -> None:
    """Run the comparison; --full adds each teacher alone, TIDAL, chats without mistakes, two more seeds."""
    start_log(0)
    began = time.monotonic()
    ensure_exercises(DATA)
    comparison = Comparison(
        title="Quickstart: two teachers teach a small student to do exercises",
        recipe=Path("configs/runs/exercises.yaml"),
        out=OUT,
        held_out=DATA / "test",
        student=STUDENT,
        context=CONTEXT,
        teachers=(MOE, DENSE),
        variants=RUNS | (FULL if full else {}),
        matched=TAUGHT,
    )
    seeds = SEEDS if full else SEEDS[:1]
    results = comparison.run(seeds)
    answered = {
        BASE: Answers.of(STUDENT),
        **{name: Answers.of(OUT / name / "model") for name in results[0]},
        **{f"teacher {one.name}": Answers.of(one.folder) for one in (MOE, DENSE)},
    }
    summary = comparison.summarise(results, seeds)
    summary["exercises"] = {
        name: answers.summary() | differences(answered, name) for name, answers in answered.items()
    }
    costs = {name: result["cpu_seconds"] for name, result in results[0].items()}
    shown = {name: answered[name] for name in (BASE, TAUGHT, "teacher dense")}
    replies = reply_table("The first held-out question of each kind", first_of_each_kind(), shown)
    scores = score_table(answered, "undistilled", costs)
    differing = where_they_differ(answered[TAUGHT], answered["undistilled"], DIFFERING)
    students = {name: answered[name] for name in (BASE, "undistilled", TAUGHT)}
    samples = reply_table("The first questions on which distilling decides", differing, students)
    sentences = findings(answered, summary)
    lead = [*in_markdown(replies), *in_markdown(scores), *sentences]
    lead += [*in_markdown(kind_table(answered)), *in_markdown(samples)]
    comparison.write(results, summary, [], began, lead=lead)
    write_answers(answered, OUT / "answers.jsonl")
    rich.print(replies.rich())
    rich.print(scores.rich())
    for sentence in sentences:
        rich.print(sentence)
    rich.print(f"report: {OUT / 'report.md'}, all replies: {OUT / 'answers.jsonl'}")


def differences(answered: Mapping[str, Answers], name: str) -> dict[str, Any]:
    """Return a model's paired differences to the students without a teacher."""
    return {
        f"to_{other}": compare(answered[name].scores, answered[other].scores).summary()
        for other in ("undistilled", "hard_twin", LONGER)
        if other != name
    }


def findings(answered: Mapping[str, Answers], summary: Mapping[str, Any]) -> list[str]:
    """Say in words what the scores do and do not show."""
    against = {
        other: compare(answered[TAUGHT].scores, answered[other].scores).difference
        for other in ("undistilled", "hard_twin", LONGER)
    }
    cost = summary[TAUGHT]["cpu_seconds"] / summary["undistilled"]["cpu_seconds"]
    return [
        f"At equal steps the distilled student is {in_words(against['undistilled'])} than the undistilled "
        f"one, and {in_words(against['hard_twin'])} than the hard twin, whose own tokens have the teachers' "
        f"weight. Its run took {cost:.1f} times the undistilled one's CPU time; given that time, the "
        f"undistilled one makes {summary[LONGER]['steps']} steps, and the distilled one is "
        f"{in_words(against[LONGER])} than it.",
        "Brackets are 95 % intervals over questions, differences are paired by question. One base student "
        "and one seed: they say nothing about others. The chats that all students go on with have a wrong "
        "answer in every third place; the base student and the teachers learned from right ones.",
    ]


def in_words(found: PairedDifference) -> str:
    """Return a paired difference of exact match as a sentence takes it."""
    low, high = (100 * end for end in found.ci95)
    bounds = f"95 % interval {low:+.1f} to {high:+.1f}"
    if not found.is_clear:
        return f"no clearly better or worse ({100 * found.mean:+.1f} points, {bounds})"
    return f"{abs(100 * found.mean):.1f} points {'better' if found.mean > 0 else 'worse'} ({bounds})"


def in_markdown(table: TextTable) -> list[str]:
    """Return a table as the report has it."""
    return [f"## {table.title}", table.markdown()]


if __name__ == "__main__":
    typer.run(main)
