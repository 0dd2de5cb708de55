"""Functions of the standard library to write again."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from tide_megatron.tasks import doctests
from tide_megatron.tasks.doctests import Doctests, functions_here

CORPUS = Path(__file__).parents[3] / "examples/quickstart/corpus.py"
IN_C = {
    "binascii.b2a_hex": (
        "def b2a_hex(data, sep=None, bytes_per_sep=1):\n"
        "    return (data.hex(sep, bytes_per_sep) if sep else data.hex()).encode()"
    ),
    "builtins.bin": "def bin(number):\n    return format(number, '#b')",
    "builtins.hex": "def hex(number):\n    return format(number, '#x')",
    "builtins.oct": "def oct(number):\n    return format(number, '#o')",
    "math.hypot": "def hypot(*coordinates):\n    return sum(x * x for x in coordinates) ** 0.5",
}


@pytest.fixture(scope="module")
def corpus():
    spec = importlib.util.spec_from_file_location("quickstart_corpus", CORPUS)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def asked(task, *names):
    return [question for question in task.questions() if question.name in names or not names]


def own(question):
    """What the library itself would reply."""
    [function] = [one for one in functions_here() if f"{one.module}.{one.name}" == question.name]
    return function.source or IN_C[question.name]


def nothing(question):
    return f"def {question.data['name']}(*args, **kwargs):\n    return None"


def test_the_quickstart_is_asked_as_it_was_taught_and_for_what_it_never_saw(corpus):
    questions = Doctests(is_short=True, only_held_out=True).questions()
    assert {question.name for question in questions} >= IN_C.keys()
    for question in questions:
        request = question.messages[0]["content"]
        assert request == corpus.cut_request(question.data["docstring"])
        file = question.data["module"].replace(".", "/") + ".py"
        assert question.name in IN_C or corpus.split_of("stdlib", file) != "train"
    seen = [question for question in Doctests().questions() if not question.data["held_out"]]
    files = {question.data["module"].replace(".", "/") for question in seen}
    assert all(
        "train" in {corpus.split_of("stdlib", f"{file}{end}") for end in (".py", "/__init__.py")}
        for file in files
    )


def test_right_functions_pass_and_wrong_ones_do_not():
    names = (
        "statistics.median",
        "textwrap.shorten",
        "builtins.bin",
    )
    task = Doctests(only_held_out=False)
    questions = asked(task, *names)
    assert len(questions) == len(names)
    right = task.judge_all([(question, own(question)) for question in questions])
    assert [one.why for one in right] == ["passed"] * len(names)
    wrong = task.judge(questions[0], nothing(questions[0]))
    assert (wrong.score, wrong.why) == (0.0, "bin(2796202) gives ''")


def test_a_short_question_takes_a_function_of_any_name():
    task = Doctests(is_short=True, only_held_out=True)
    [question] = asked(task, "builtins.oct")
    assert task.judge(question, "```python\ndef octal(x):\n    return format(x, '#o')\n```").why == "passed"
    assert task.judge(question, "from builtins import oct").score == 0.0


def test_the_body_alone_is_a_reply():
    [question] = asked(Doctests(), "builtins.hex")
    assert Doctests().judge(question, "    return format(number, '#x')").score == 1.0


@pytest.mark.slow
def test_the_librarys_own_functions_pass_all_and_nothing_passes_none():
    task = Doctests()
    questions = task.questions()
    right = task.judge_all([(question, own(question)) for question in questions])
    assert [(q.name, one.why) for q, one in zip(questions, right, strict=True) if one.score < 1.0] == []
    for wrong in (nothing, lambda _: ""):
        judged = task.judge_all([(question, wrong(question)) for question in questions])
        assert [q.name for q, one in zip(questions, judged, strict=True) if one.score > 0.0] == []


def test_every_name_left_out_is_one_of_the_library():
    names = {f"{one.module}.{one.name}" for one in functions_here()}
    assert names >= doctests._LEFT_OUT
