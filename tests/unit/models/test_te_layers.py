"""Both engines are the same model: as one is named, so is the other, in checkpoints too; values agree."""

import os
import subprocess
import sys
from pathlib import Path

import tide_megatron.platform

import pytest

from tests.te_layers import compare
from tests.unit.models.test_params import CONFIGS
from tide_megatron.base.device import choose_device
from tide_megatron.base.transformer_engine import find_transformer_engine


def test_every_architecture_in_its_layers_is_the_same_model():
    """With what megatron-core wraps of Transformer Engine in plain torch, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.te_stand_in"],
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([".", "tools"])},
    )
    lines = [line.rsplit(" ", 2) for line in done.stdout.splitlines()]
    assert [words[0] for words in lines if len(words) == 3] == [*CONFIGS, "centred"], done.stderr
    for name, rows, gradients in lines:
        assert float(rows) < 1e-6, f"{name}: rows"
        assert float(gradients) < 1e-6, f"{name}: gradients"


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_in_the_real_layers_is_the_same_model(groups, name):
    library = find_transformer_engine()
    if not library.is_usable:
        pytest.skip(str(library))
    assert compare(name, groups, choose_device("cuda"), "bf16") < 0.03
