"""Every planted fault still finds its place in the code, and what it leaves there is Python."""

import ast
from pathlib import Path

import pytest

from planted_faults import FAULTS, Fault

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_finds_its_place(name):
    for path, text in FAULTS[name].applied(ROOT).items():
        assert text != path.read_text(encoding="utf-8")
        ast.parse(text)


def test_a_fault_without_place_or_tests_is_named():
    with pytest.raises(LookupError, match="nothing below tide_megatron/base matches 'no such code'"):
        Fault(below="tide_megatron/base", pattern="no such code", mistake="", tests=()).applied(ROOT)
    with pytest.raises(LookupError, match=r"no tests \['tests/gone'\]"):
        Fault(below="tide_megatron/base", pattern="import", mistake="", tests=("tests/gone",)).applied(ROOT)
