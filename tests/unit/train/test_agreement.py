"""agreement.jsonl: a line a measurement, without those of steps that a later start did again."""

import json

from tide_megatron.base.clock import Clock
from tide_megatron.train.agreement import keep_agreement


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "agreement.jsonl").read_text().splitlines()]


def test_lines_of_the_same_or_a_later_moment_and_torn_ones_go(tmp_path):
    for step in (1, 2, 3):
        keep_agreement(tmp_path, Clock(step=step, consumed=8 * step, total_steps=9), {"samples": 4})
    assert steps(tmp_path) == [1, 2, 3]
    with (tmp_path / "agreement.jsonl").open("a") as file:
        file.write('[1]\n{"step": 4, "cons')
    keep_agreement(tmp_path, Clock(step=2, consumed=16, total_steps=9), {"samples": 4})
    assert steps(tmp_path) == [1, 2]
