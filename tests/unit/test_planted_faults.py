"""The fault tool: its list fits the code, its mutations are what they say, and it tells red from green."""

import ast
import fnmatch
import subprocess
import sys
from pathlib import Path

import pytest

from faults.mutations import Plan, all_mutations, mutations_of, pick
from faults.planted import read_faults

ROOT = Path(__file__).parents[2]
SOURCE = '''
"""Speaks of 1 + 1."""

LIMIT = -1


def wrong(left: int = 0, right: float | None = None) -> int | None:
    """Add 2 + 2."""
    assert left < 7, f"{left + 1}"
    if right is None and not left:
        raise ValueError("x" * 2)
    return left * 2.5


class Thing:
    def __repr__(self) -> str:
        return "a" + "b"
'''
CHANGES = {
    "LIMIT = -1 -> LIMIT = 0",
    "LIMIT = -1 -> LIMIT = 1",
    "left: int=0, right: float | None=None -> left: int=1, right: float | None=None",
    "left < 7 -> left <= 7",
    "left < 7 -> left < 8",
    "right is None and (not left) -> right is None or not left",
    "right is None -> right is not None",
    "not left -> left",
    "left * 2.5 -> left / 2.5",
    "left * 2.5 -> left * 5.0",
}


def test_every_planted_fault_fits_the_code():
    faults = read_faults()
    assert len(faults) >= 20
    assert [fault.complaint(ROOT) for fault in faults] == [None] * len(faults)
    for fault in faults:
        text = (ROOT / fault.file).read_text(encoding="utf-8")
        assert fault.applied(text) != text
        ast.parse(fault.applied(text))


def test_a_stale_fault_is_named(tmp_path):
    fault = read_faults()[0]
    assert "does not exist" in fault.complaint(tmp_path)
    path = tmp_path / fault.file
    path.parent.mkdir(parents=True)
    path.write_text(fault.original * 2)
    assert "holds 2 times" in fault.complaint(tmp_path)
    path.write_text(fault.original)
    assert "no such tests" in fault.complaint(tmp_path)


def test_mutations_of_a_small_file():
    found = {mutation.key.split(": ", 1)[1]: mutation for mutation in mutations_of("a.py", SOURCE)}
    assert set(found) == CHANGES
    for mutation in found.values():
        assert mutation.replaced in mutation.text
        assert mutation.text != ast.unparse(ast.parse(SOURCE))
    assert found["left < 7 -> left <= 7"].line == 9


def test_picks_follow_the_seed_and_survive_other_edits():
    everything = list(mutations_of("a.py", SOURCE))
    names = [mutation.key for mutation in pick(everything, 5, 1, ())]
    assert names == [mutation.key for mutation in pick(list(mutations_of("a.py", SOURCE)), 5, 1, ())]
    assert names != [mutation.key for mutation in pick(everything, 5, 2, ())]
    edited = list(mutations_of("a.py", SOURCE.replace("LIMIT = -1", "MORE = False\n\nLIMIT = -1")))
    assert names == [mutation.key for mutation in pick(edited, 5, 1, ())]
    left = pick(everything, 99, 1, ["a.py:wrong: left < *"])
    assert len(left) == len(everything) - 2


def test_every_file_has_tests_and_every_excuse_a_mutation():
    plan = Plan.read()
    everything = all_mutations(ROOT, plan.folders)
    assert len({mutation.key for mutation in everything}) == len(everything) > 300
    for mutation in everything:
        assert all((ROOT / test).exists() for test in plan.tests_of(mutation.file))
    for pattern in plan.equivalent:
        assert any(fnmatch.fnmatchcase(mutation.key, pattern) for mutation in everything), pattern


@pytest.mark.slow
def test_one_fault_is_caught_and_a_wrong_name_refused(tmp_path):
    tool = [sys.executable, str(ROOT / "tools" / "planted_faults.py")]
    before = {path: path.read_bytes() for path in (ROOT / "tide_megatron" / "losses").glob("*.py")}
    good = subprocess.run(
        [*tool, "--only", "calm-without-temperature", "--json", str(tmp_path / "found.json")],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert good.returncode == 0, good.stdout + good.stderr
    assert "caught 1 of 1" in good.stdout
    assert (tmp_path / "found.json").exists()
    assert before == {path: path.read_bytes() for path in before}
    bad = subprocess.run(
        [*tool, "--only", "nothing"], capture_output=True, text=True, timeout=60, check=False
    )
    assert bad.returncode != 0
    assert "no such planted fault: nothing" in bad.stderr
