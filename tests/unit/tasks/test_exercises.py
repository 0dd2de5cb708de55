"""Exercises: one exact answer each, the same everywhere, and none that is both trained on and held out."""

import itertools
import re

import pytest

from tide_megatron.base.errors import ConfigError
from tide_megatron.tasks import find_task
from tide_megatron.tasks.exercises import SPLITS, Exercises, distinct, draw, split_of


def solved(question):
    """Return the answer, worked out once more from the question's text alone."""
    if found := re.fullmatch(r"What is (\d)(\d) \+ (\d)(\d)\?", question):
        return f"{int(found[1]) + int(found[3])}{int(found[2]) + int(found[4])}"
    if found := re.fullmatch(r"Sort ([A-H]{3,5})", question):
        return "".join(letter * found[1].count(letter) for letter in "ABCDEFGH")
    if found := re.fullmatch(r"Reverse ([A-H]{3,5})", question):
        return "".join(reversed(found[1]))
    found = re.fullmatch(r"Replace ([A-H]) by ([A-H]) in ([A-H]{3,5})", question)
    assert found[1] in found[3]
    assert found[1] != found[2]
    return "".join(found[2] if letter == found[1] else letter for letter in found[3])


def test_answers_are_right_and_no_sum_needs_carrying():
    for one in itertools.islice(draw("train", 1), 2000):
        assert one.answer == solved(one.question)
        assert one.answer not in one.question
        assert one.kind != "add" or len(one.answer) == 2
        assert one.chat()[1] == {"role": "assistant", "content": one.answer}


def test_no_question_is_in_two_splits_whatever_the_seeds():
    found = {
        split: {one.question for seed in (0, 1) for one in itertools.islice(draw(split, seed), 1500)}
        for split in SPLITS
    }
    # Nor is a sum whose numbers have changed places.
    for questions in found.values():
        turned = (re.sub(r"(\d+) \+ (\d+)", r"\2 + \1", question) for question in tuple(questions))
        questions.update(turned)
    for one, other in itertools.combinations(found.values(), 2):
        assert not one & other


def test_a_split_is_a_function_of_the_text_and_has_its_share():
    assert [split_of(f"Sort {letters}") for letters in ("AAA", "AAC", "AAH")] == ["train", "dev", "test"]
    places = [split_of(str(number)) for number in range(4000)]
    assert 0.67 < places.count("train") / 4000 < 0.73
    assert 0.13 < places.count("test") / 4000 < 0.17


def test_the_task_asks_the_same_different_questions_of_each_kind_every_time():
    questions = Exercises().questions()
    assert questions == Exercises().questions()
    assert questions != Exercises(seed=1).questions()
    assert len({question.name for question in questions}) == len(questions) == 1000
    kinds = [question.data["kind"] for question in questions]
    assert kinds[:5] == ["add", "sort", "reverse", "replace", "add"]
    assert {kinds.count(kind) for kind in kinds} == {250}
    assert [question.name for question in questions[:4]] == [
        "What is 48 + 30?",
        "Sort CCFGB",
        "Reverse AFHF",
        "Replace F by B in CCF",
    ]


def test_a_reply_is_right_if_it_is_the_answer_and_nothing_else():
    task = find_task("exercises")
    question = task.questions()[0]
    assert task.judge(question, "78").score == task.judge(question, " 78\n").score == 1.0
    for reply in ("", "7", "788", "87", "7 8", "78.", "It is 78"):
        judged = task.judge(question, reply)
        assert (judged.score, judged.why) == (0.0, "the answer is 78")


def test_more_questions_than_there_are_and_unequal_shares_are_refused():
    with pytest.raises(ConfigError, match="count: 1400 is more than split test has"):
        distinct("test", 0, 1400)
    for count in (0, 7):
        with pytest.raises(ConfigError, match=f"count: {count} is no multiple of 4"):
            distinct("test", 0, count)
    with pytest.raises(ConfigError, match=r"'tset' is unknown.*test"):
        next(draw("tset", 0))
