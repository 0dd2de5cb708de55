"""A run asks its student: tasks and prompts of the recipe, with replies in the run folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from tide_megatron.base.clock import Clock
from tide_megatron.base.disk import disk_faults
from tide_megatron.base.errors import TideError
from tide_megatron.base.files import write_text
from tide_megatron.checkpoint.retention import TASK_SCORE
from tide_megatron.parallel.collectives import fail_together, is_first
from tide_megatron.tasks.in_training import shown_answers, task_scores
from tide_megatron.train.folder import REPLIES
from tide_megatron.train.metrics import Metrics
from tide_megatron.train.recipe import Recipe
from tide_megatron.train.setup import Setup


def ask_student(recipe: Recipe, setup: Setup, clock: Clock, metrics: Metrics) -> dict[str, float]:
    """Ask the student what the recipe says, and tell. All ranks call it together.

    Returns:
        `tasks/NAME` -> mean score, of each task.
    """
    if setup.tasks is None:
        return {}
    student = setup.run.student
    with setup.run.phases("evaluate"):
        answers = setup.tasks.ask(student.model, student.context)
    scores = task_scores(answers)
    with fail_together():
        if is_first():
            folder = Path(recipe.folder) / REPLIES
            lines = [json.dumps(dataclasses.asdict(answer), ensure_ascii=False) + "\n" for answer in answers]
            with disk_faults(folder, TideError, "; the run goes on from its last whole checkpoint"):
                folder.mkdir(exist_ok=True, parents=True)
                write_text(folder / f"step-{clock.step:08d}.jsonl", "".join(lines))
    metrics.asked(clock, scores, shown_answers(answers, recipe.evaluation.shown))
    return {f"{TASK_SCORE}{name}": score for name, score in scores.items()}
