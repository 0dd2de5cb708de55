"""Goals of `make gpu-bench` are judged from the rows that there are, and its rows fit the card it is for."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu_goals import BENCHES, GOALS, judge
from bench.gpu_ways import needed_bytes, require_room, setting_of, weight_bytes
from bench.shapes import LLADA2_MINI, QWEN3_06B, WEDLM_8B
from gpu_check.__main__ import PART_SECONDS
from gpu_check.rows import NotMeasured, Row
from tide_megatron.base.device import Device
from tide_megatron.models.precision import Fp8Options

ROOT = Path(__file__).parents[3]
H100 = 84.9e9
"""Bytes that an H100 with 80 GB has free: 79.1 GiB."""
MEASURED = {
    "shared ours": {"tokens_per_second": 5000.0, "objective": 10.0, "student_mfu": 0.2},
    "shared reference": {"tokens_per_second": 2000.0, "objective": 10.05},
    "cross ours": {"tokens_per_second": 3000.0, "objective": 10.0},
    "cross reference": {"tokens_per_second": 2000.0, "objective": 10.3},
    "linears": {"speedup": 1.5},
    "mixture layer": {"speedup": 3.9},
    "head": {"over_floor": 1.3},
}
WANTED = dict(zip((goal.name for goal in GOALS), ["passed", "missed"] * 3, strict=True))


def rows_of(measured):
    return [Row(check=name, text="seen", figures=figures) for name, figures in measured.items()]


def judged(rows, *, is_rehearsal=False):
    return {row.check.removeprefix("goal: "): row for row in judge(rows, is_rehearsal=is_rehearsal)}


def test_goals_are_reached_or_missed():
    found = judged(rows_of(MEASURED))
    assert {name: row.verdict for name, row in found.items()} == WANTED
    assert found["whole step, shared, over the reference's way"].figures == {"value": 2.5, "limit": 2.5}
    assert {row.verdict for row in judged(rows_of(MEASURED), is_rehearsal=True).values()} == {"not measured"}


@pytest.mark.parametrize("lost", MEASURED)
def test_a_row_that_is_missing_or_failed_takes_its_own_goal_alone(lost):
    needing = {goal.name for goal in GOALS if lost in goal.needs}
    failed = [
        dataclasses.replace(row, verdict="failed", text="it died") if row.check == lost else row
        for row in rows_of(MEASURED)
    ]
    missing = [row for row in rows_of(MEASURED) if row.check != lost]
    for rows, why in ((failed, f"{lost}: it died"), (missing, f"{lost}: was not asked for")):
        found = judged(rows)
        assert {name for name, row in found.items() if row.verdict == "not measured"} == needing
        assert all(why in found[name].text for name in needing)


def test_two_ways_that_compute_something_else_are_no_ratio():
    spoilt = MEASURED | {"cross ours": MEASURED["cross ours"] | {"objective": float("nan")}}
    spoilt["shared ours"] = MEASURED["shared ours"] | {"objective": 10.2}
    found = judged(rows_of(spoilt))
    assert [name for name, row in found.items() if row.verdict == "failed"] == [
        "whole step, shared, over the reference's way",
        "whole step, cross, over the reference's way",
    ]


def test_without_a_known_peak_there_is_no_mfu():
    spoilt = MEASURED | {"shared ours": MEASURED["shared ours"] | {"student_mfu": None}}
    assert judged(rows_of(spoilt))["student's MFU, forward and backward"].verdict == "not measured"


def test_every_goal_is_of_checks_that_are_made_and_the_part_ends_within_five_minutes():
    assert {check for goal in GOALS for check in goal.needs} <= {check.name for check in BENCHES}
    assert PART_SECONDS["bench"] < 300


def test_every_way_fits_an_h100_and_what_does_not_is_refused_with_numbers():
    dense, mixture = (weight_bytes(config, torch.bfloat16) for config in (WEDLM_8B, LLADA2_MINI))
    small = weight_bytes(LLADA2_MINI, torch.bfloat16, Fp8Options())
    assert (round(dense / 1e9, 1), round(mixture / 1e9, 1), round(small / 1e9, 1)) == (16.4, 32.5, 17.0)
    student = 9 * weight_bytes(QWEN3_06B, torch.bfloat16)  # 18 bytes a parameter
    for pipeline, way, teacher in (
        ("shared", "ours", dense),
        ("shared", "reference", dense),
        ("cross", "ours", small),
        ("cross", "reference", mixture),
    ):
        needed = needed_bytes(setting_of(pipeline, way, small=False), way)
        assert teacher + student < needed < H100, (pipeline, way)
    cross = setting_of("cross", "ours", small=False)
    whole = needed_bytes(dataclasses.replace(cross, fp8=None), "ours")
    assert whole - needed_bytes(cross, "ours") == mixture - small
    cpu = Device(type="cpu", index=0, backend="gloo", threads=1)
    require_room(1e15, cpu)  # a rehearsal measures no memory


def test_a_gpu_without_room_is_told(monkeypatch):
    monkeypatch.setattr("bench.gpu_ways.free_bytes", lambda device: 40 * 10**9)
    gpu = Device(type="cuda", index=0, backend="nccl", threads=1, name="H100")
    require_room(39e9, gpu)
    with pytest.raises(NotMeasured, match="about 80 GB, and 40 GB are free on H100"):
        require_room(80e9, gpu)


def test_the_command_lists_what_it_measures():
    command = [sys.executable, str(ROOT / "tools/bench/gpu_step.py"), "--list"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert all(check.name in done.stdout for check in BENCHES)
