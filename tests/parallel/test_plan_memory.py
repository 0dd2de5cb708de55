"""What a plan says that is alive is what the system sees resident, phase by phase, above 1 GiB."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.tiny_run import student_config, teacher_config

SIZES = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 32_000,
}
WITHIN = {"student": 0.05, "head": 0.05, "backward": 0.05, "optimizer": 0.08}
"""Share of what is resident. In the update some more is held than planned (docs/log.md). What is asked for
and never touched is not resident, so the teacher's phase is held to counted tensors alone."""


def write(folder):
    context = {"kind": "block_diffusion", "block_size": 32}
    configs = {
        "student": student_config(32_000) | SIZES,
        "teacher": teacher_config(32_000, 8) | SIZES | {"num_hidden_layers": 4, "moe_intermediate_size": 256},
    }
    for name, config in configs.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tree = {
        "folder": str(folder / "run"),
        "steps": 3,
        "student": {"folder": str(folder / "student"), "context": context},
        "teachers": {"moe": {"folder": str(folder / "teacher"), "context": context}},
        "data": {"train": str(folder / "nowhere"), "fixed_length": 256},
        "batch": {"samples": 8, "microbatch": 4},
        "losses": {"ce": {"kind": "cross_entropy"}, "kl": {"kind": "kl", "teacher": "moe"}},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return folder / "run.yaml"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("words", [(), ("student.recompute=true",)], ids=["kept", "recomputed"])
def test_planned_is_resident(tmp_path, words):
    program = Path(__file__).with_name("plan_memory.py")
    root = program.parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), str(write(tmp_path)), *words],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    for phase in ("teacher", "student", "head", "backward"):
        assert found["planned"][phase] == pytest.approx(found["counted"][phase], rel=0.01), (phase, found)
    for phase, within in WITHIN.items():
        assert found["planned"][phase] == pytest.approx(found["resident"][phase], rel=within), (phase, found)
