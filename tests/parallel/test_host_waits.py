"""How often the host would wait for a GPU in a whole step: for the terms it reports, whatever the step is."""

import pytest
import torch

from tests.operations import Waits
from tests.tiny_run import PAIR_ON_FOUR, write_cross_run, write_pair_run
from tide_megatron.base.clock import Clock
from tide_megatron.base.device import choose_device
from tide_megatron.train.resolve import load_recipe
from tide_megatron.train.setup import set_up
from tide_megatron.train.step import train_step

MOST = 3
"""Waits a step, outside megatron-core."""


def waits(file, folder, words):
    """Step twice and count in the second step: where a GPU would make the host wait."""
    recipe, _ = load_recipe(file, [f"folder={folder}", *words])
    parts = set_up(recipe, choose_device("cpu"))
    update = parts.run.student.update

    def unseen(*arguments, **named):
        # Our stand-in for a GPU's type strings, which megatron-core compares, does not work under a mode.
        with torch._C.DisableTorchFunction():
            return update(*arguments, **named)

    parts.run.student.update = unseen
    for number in range(2):
        given = parts.run.read(parts.loader.update(number * parts.loader.update_samples))
        with Waits() as counted:
            assert train_step(parts.run, given, Clock(total_steps=9)).update.applied
    return counted.places


@pytest.mark.parametrize(
    ("write", "ranks", "words"),
    [
        (write_cross_run, 1, ["batch.samples=4", "batch.microbatch=4"]),
        (write_cross_run, 2, ["batch.samples=8", "batch.microbatch=1"]),
        (write_pair_run, 4, PAIR_ON_FOUR),
        (
            write_pair_run,
            4,
            [*PAIR_ON_FOUR, "batch.microbatch=2", "batch.pack=true", "data.fixed_length=160"],
        ),
    ],
    ids=["two teachers", "four microbatches", "three layouts, two microbatches", "three layouts, packs"],
)
def test_a_step_waits_for_its_terms_and_nothing_else(pool, tmp_path, write, ranks, words):
    for places in pool(ranks).run(waits, write(tmp_path / "models"), tmp_path / "run", list(words)):
        assert places.total() <= MOST, places
        assert "tolist in train/step.py: values = packed.tolist()" in places, "the count sees something"
