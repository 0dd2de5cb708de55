"""The rule that finds a program in a reply."""

from __future__ import annotations

import pytest

from tide_megatron.tasks.code import function_of, program_of

OPENING = 'import math\n\ndef f(x):\n    """Return x + 1."""\n'
BODY = "    y = x\n    return y + 1\n"
WHOLE = "def f(x):\n" + BODY
REPLIES = {
    "body": BODY,
    "body without its first indent": "y = x\n    return y + 1",
    "body without any indent": "y = x\nreturn y + 1",
    "body and more": BODY + "\nThis works because one is added.\n",
    "body behind an empty line": "\n" + BODY,
    "whole": WHOLE,
    "whole in prose": "Here you are:\n\n" + WHOLE + "\nIt adds one.",
    "prose that looks like code": "from the task, this is clear:\n" + WHOLE + "Done!",
    "fence": f"Sure.\n```python\n{WHOLE}```\nDone.",
    "fence without a language": f"```\n{WHOLE}```",
    "fence that is not closed": f"```python\n{WHOLE}",
    "fence with a body": f"```python\n{BODY}```",
    "second fence": f"```\nf(1)\n```\nand\n```python\n{WHOLE}```",
    "indented fence": "  ```python\n  def f(x):\n      return x + 1\n  ```",
    "other functions": "```\nimport math\n\ndef g(x):\n    return x + 1\n\ndef f(x):\n    return g(x)\n```",
    "calls math of the opening": WHOLE.replace("y + 1", "math.floor(y) + 1"),
    "tabs": WHOLE.replace("    ", "\t"),
    "cut in the middle of a line": WHOLE + "\ndef g(x",
}


def defined(program):
    names = {}
    exec(program, names)
    return names


@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES)
def test_programs_are_found(reply):
    assert defined(program_of(reply, OPENING, "f"))["f"](2) == 3


@pytest.mark.parametrize("reply", ["", "I cannot do that.", "```\n```", "def f(x", "    return ("])
def test_where_there_is_none_the_opening_stands_alone(reply):
    assert defined(program_of(reply, OPENING, "f"))["f"](2) is None


def test_a_function_of_another_name_counts_where_none_was_asked_for():
    assert defined(function_of("def plus(x):\n    return x + 1", "f"))["f"](2) == 3
    assert defined(function_of("def g(x): return 0\n\n" + WHOLE, "f"))["f"](2) == 3
    assert function_of("no code", "f") == ""
