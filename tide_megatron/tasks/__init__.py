"""Tasks that a model is scored on: questions, and a judge of replies. A new one is a file and a line here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tide_megatron.base.errors import ConfigError, nearest
from tide_megatron.tasks.doctests import Doctests
from tide_megatron.tasks.exercises import Exercises
from tide_megatron.tasks.humaneval import HumanEval
from tide_megatron.tasks.program_task import ProgramTask
from tide_megatron.tasks.task import Task

TASKS: dict[str, Callable[[], Task]] = {
    "exercises": Exercises,
    "humaneval": HumanEval,
    "humaneval_instruct": lambda: HumanEval(name="humaneval_instruct", is_begun=True),
    "doctests": Doctests,
    "doctests_quickstart": lambda: Doctests(name="doctests_quickstart", is_short=True, only_held_out=True),
}
"""Tasks by the name that `--tasks` takes; each makes its task with the defaults, and reads no data yet."""


def find_task(name: str, *, is_unsandboxed: bool = False) -> Task:
    """Return a task by its name.

    Args:
        name: in the table.
        is_unsandboxed: let it run programs without isolation, if it runs any.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in TASKS:
        raise ConfigError(f"tasks: {name!r} is unknown; {nearest(name, TASKS)}")
    task = TASKS[name]()
    if is_unsandboxed and isinstance(task, ProgramTask):
        return dataclasses.replace(task, isolation="none")
    return task
