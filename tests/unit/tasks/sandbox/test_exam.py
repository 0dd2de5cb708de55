"""A program cannot forge a verdict: what judges it runs in another process, and sees plain values."""

from __future__ import annotations

import pytest

from tide_megatron.tasks.sandbox.exam import examine, replay
from tide_megatron.tasks.sandbox.options import Limits
from tide_megatron.tasks.sandbox.sandbox import Sandbox, at_once

TEST = """
def check(candidate):
    assert candidate([3, 1, 2]) == [1, 2, 3]
    assert candidate([]) == []
    try:
        candidate(None)
    except TypeError:
        return
    assert False, "None is no list"
"""
RIGHT = "def f(x):\n    return sorted(x)\n"
FORGERIES = {
    "leaves before the test": "import os\ndef f(x): return 0\nos._exit(0)",
    "leaves within the test": "import os\ndef f(x): os._exit(0)",
    "leaves politely": "import sys\ndef f(x): sys.exit(0)",
    "leaves at the end": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): raise SystemExit(0)",
    "equals everything": """
class All:
    def __eq__(self, other): return True
def f(x): return All()
""",
    "a list that equals everything": """
class All(list):
    def __eq__(self, other): return True
def f(x): return All([9])
""",
    "patches what judges": """
import builtins
builtins.AssertionError = ValueError
builtins.sorted = lambda x: x
def f(x): return x
""",
    "patches the session": """
import gc
for one in gc.get_objects():
    if type(one).__name__ == 'Session':
        one._call = lambda request: {'output': '', 'error': None, 'value': True}
def f(x): return True
""",
    "writes verdicts to every pipe": """
import os
said = b'{"output": "", "error": null}'
for number in range(64):
    try:
        for _ in range(9): os.write(number, len(said).to_bytes(4, 'big') + said)
    except OSError: pass
def f(x): return 0
""",
    "answers that are none": """
import os
for number in range(64):
    try: os.write(number, b'\\0\\0\\0\\2[]' * 9)
    except OSError: pass
def f(x): return 0
""",
    "an exception for the test": "def f(x):\n    raise SystemExit(0)",
    "nested too deeply": "def f(x):\n    y = []\n    for _ in range(10**5): y = [y]\n    return y",
    "holds itself": "def f(x):\n    y = []\n    y.append(y)\n    return y",
}


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox("auto", Limits(cpu_seconds=5, memory_mib=256))


def exam(sandbox, program):
    return examine(sandbox, program, setting=TEST, test="check(f)", names=["f"])


def test_no_forgery_passes_and_what_is_right_does(sandbox):
    programs = [RIGHT, *FORGERIES.values()]
    right, *forged = at_once(lambda program: exam(sandbox, program), programs, 2)
    assert right is None
    assert [name for name, why in zip(FORGERIES, forged, strict=True) if why is None] == []


def test_why_says_what_happened(sandbox):
    assert exam(sandbox, "def f(x): return x") == "AssertionError"
    assert exam(sandbox, "def g(x): return x") == "NameError: name 'f' is not defined"
    assert exam(sandbox, "def f(x:").startswith("SyntaxError")
    assert exam(sandbox, "import os\ndef f(x): os._exit(3)") == "exit code 3 without an answer"


def test_a_program_never_sees_the_test(sandbox):
    nosy = """
import gc
def f(x):
    raise ValueError(sum(isinstance(one, dict) and 'check' in one for one in gc.get_objects()))
"""
    assert exam(sandbox, nosy) == "ValueError: 0"


def test_lines_run_behind_a_program_in_its_module(sandbox):
    program = "def mean(data):\n    return sum(data) / len(data)"
    told = replay(sandbox, program, ["mean([1, 2])", "mean([])"], module="statistics", name="mean")
    assert [(one.output, one.raised) for one in told] == [
        ("1.5\n", None),
        ("", "ZeroDivisionError: division by zero"),
    ]
    gone = replay(sandbox, "from statistics import mean", ["mean([1])"], module="statistics", name="mean")
    assert isinstance(gone, str)
    assert gone.startswith("ImportError")
