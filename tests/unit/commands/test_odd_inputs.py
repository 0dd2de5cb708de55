"""Every verb answers odd inputs with one message, in time, and leaves nothing half-written."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from spoil import spoil_bytes, spoil_value

ROOT = Path(__file__).parents[3]


@pytest.mark.timeout(9000)
@pytest.mark.parametrize("cases", [10, pytest.param(300, marks=pytest.mark.slow)])
def test_no_verb_ends_in_a_traceback_or_leaves_half_of_something(cases):
    done = subprocess.run(
        [sys.executable, "tools/fuzz_verbs.py", "--cases", str(cases)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=30 * cases + 600,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def test_spoilt_files_are_spoilt_alike_by_one_seed(tmp_path):
    """And a finding's number is enough to see it again."""
    told = []
    for _ in range(2):
        said = []
        for number in range(40):
            file = tmp_path / "config.json"
            if file.is_symlink() or file.exists():
                file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink()
            file.write_text('{"a": 1, "b": {"c": [1, "x"]}}')
            chance = random.Random(f"7/{number}")
            said.append(spoil_value(file, chance) if number % 2 else spoil_bytes(file, chance))
        told.append(said)
    assert told[0] == told[1]
    assert len(set(told[0])) > 20
