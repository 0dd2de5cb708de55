"""The protocol: any class that does what it says is a task; many replies are judged at once where it can."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tide_megatron import tasks
from tide_megatron.base.errors import ConfigError
from tide_megatron.tasks.task import Judged, Question, judge_all


@dataclass(frozen=True)
class Echo:
    """Right is who repeats the question."""

    name: str = "echo"

    def questions(self):
        messages = ({"role": "user", "content": "say a"},)
        return [Question(name="a", messages=messages, data={"answer": "a"})]

    def judge(self, question, reply):
        return Judged(score=float(reply == question.data["answer"]), why="")


@dataclass(frozen=True)
class EchoOfMany(Echo):
    def judge_all(self, pairs):
        return [Judged(score=float(len(pairs)), why="together") for _ in pairs]


def test_replies_are_judged_one_by_one_and_in_order():
    [question] = Echo().questions()
    assert [one.score for one in judge_all(Echo(), [(question, "a"), (question, "b")])] == [1.0, 0.0]


def test_a_task_that_judges_many_is_given_all():
    [question] = Echo().questions()
    assert [one.score for one in judge_all(EchoOfMany(), [(question, "a"), (question, "b")])] == [2.0, 2.0]


def test_a_task_is_one_line_of_the_table(monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "echo", Echo)
    assert tasks.find_task("echo") == Echo()
    with pytest.raises(ConfigError, match=r"'ecco' is unknown; did you mean 'echo'"):
        tasks.find_task("ecco")


def test_only_a_task_that_is_named_runs_programs_without_the_sandbox():
    assert tasks.find_task("humaneval").isolation == "auto"
    assert tasks.find_task("humaneval", is_unsandboxed=True).isolation == "none"
    assert tasks.find_task("exercises", is_unsandboxed=True) == tasks.find_task("exercises")
