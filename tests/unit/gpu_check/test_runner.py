"""A check that goes wrong is one row of the table, whatever it does; the others go on."""

import dataclasses
import time

import pytest

from bench.gpu_goals import BENCHES
from gpu_check.checks import CHECKS, Check
from gpu_check.rows import Place
from gpu_check.runner import Plan, run_checks


@pytest.fixture
def plan(tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    place = Place(device="cpu", assets=tmp_path, scratch=tmp_path / "scratch")
    return Plan(place=place, logs=logs, jobs=2, deadline=time.monotonic() + 120)


def made_up(name, **options):
    return Check(name=name, function=f"tests.unit.gpu_check.made_up:{name}", **options)


def test_checks_go_wrong_alone(plan):
    told = []
    checks = [
        made_up("raises"),
        made_up("dies"),
        made_up("hangs", limit_seconds=8),
        made_up("cannot"),
        made_up("passes", arguments=("well",)),
    ]
    began = time.monotonic()
    rows = {row.check: row for row in run_checks(checks, plan, told.append)}
    assert time.monotonic() - began < 60
    assert len(told) == 5
    assert rows["raises"].verdict == "failed"
    assert "ValueError: no such thing" in rows["raises"].text
    assert rows["dies"].verdict == "failed"
    assert "exit code 7" in rows["dies"].text
    assert "the last words" in rows["dies"].text
    assert (rows["hangs"].verdict, rows["hangs"].text[:12]) == ("failed", "no answer in")
    assert (rows["cannot"].verdict, rows["cannot"].text) == ("not measured", "it needs a moon")
    assert (rows["passes"].verdict, rows["passes"].text) == ("passed", "well on cpu")
    assert "a word for the log" in (plan.logs / "passes.log").read_text()


def test_started_ahead_they_go_wrong_alone_and_in_order(plan):
    ahead = dataclasses.replace(plan, jobs=1, is_ahead=True)
    checks = [
        made_up("hangs", limit_seconds=4),  # meanwhile the next one ends, before it is told to begin
        Check(name="missing", function="tests.unit.gpu_check.made_up:missing"),
        made_up("dies"),
        made_up("passes", arguments=("well",)),
    ]
    rows = run_checks(checks, ahead, lambda row: None)
    assert [row.check for row in rows] == ["hangs", "missing", "dies", "passes"]
    assert [row.verdict for row in rows] == ["failed", "failed", "failed", "passed"]
    assert rows[1].text.startswith("AttributeError")


@pytest.mark.parametrize("is_ahead", [False, True])
def test_what_a_part_has_no_time_for_is_a_row(plan, is_ahead):
    late = Plan(place=plan.place, logs=plan.logs, jobs=1, deadline=time.monotonic() - 1, is_ahead=is_ahead)
    (row,) = run_checks([made_up("passes", arguments=("never",))], late, lambda row: None)
    assert row.verdict == "not measured"


def test_every_check_is_named_once_and_can_be_loaded():
    every = (*CHECKS, *BENCHES)
    assert len({check.name for check in every}) == len(every)
    for check in every:
        assert callable(check.load())
