"""What the host asks of a device in a step: how many tokens are masked, once a microbatch, and no length."""

import dataclasses

import pytest
import torch

from tests.operations import Asked
from tests.unit.diffusion.sides import random_batch
from tide_megatron.diffusion.batch import Noised
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.diffusion.views import Complementary, trimmed_view
from tide_megatron.losses.cross_entropy import CrossEntropy
from tide_megatron.losses.rows import rows_of
from tide_megatron.teachers.teacher import ViewBuilder

NOWHERE = torch.device("meta")
"""A device that has shapes only: whoever asks it for a number fails."""
BLOCKS, WHOLE = Context(kind="block_diffusion", block_size=4), Context(kind="bidirectional")


def read_by_all(noised, names):
    """Make what a student and some teachers read of a microbatch, and its rows."""
    rows_of(noised)
    trimmed_view(noised, BLOCKS, 0)
    split = Complementary(seed=1)
    for view_builder in (
        ViewBuilder(context=BLOCKS, mask_id=0),
        ViewBuilder(context=WHOLE, mask_id=0),
        ViewBuilder(context=BLOCKS, mask_id=0, complementary=split),
        ViewBuilder(context=WHOLE, mask_id=0, complementary=split),
    ):
        for name in names:
            view_builder.views(name, noised)


@pytest.mark.parametrize(("names", "most"), [(["one", "two"], 1), (["t0", "one"], 2)])
def test_rows_are_asked_for_once_a_tokenizer(names, most):
    batch = random_batch(1, sides=int("t0" in names)).to(torch.device("cpu"))
    noised = Noiser(seed=1).at(batch, 0.6)
    with Asked() as asked:
        read_by_all(noised, names)
    assert asked.calls == {"nonzero": most}


def test_a_batch_brings_its_numbers_to_the_device():
    batch = random_batch(2)
    moved = batch.to(NOWHERE)
    assert moved.ids.device == NOWHERE
    assert moved.fingerprint == batch.fingerprint
    assert moved.host_lengths == tuple(batch.lengths.tolist()) == (14, 14, 14)
    assert moved.sides["t0"].host_lengths == tuple(batch.sides["t0"].lengths.tolist())
    assert moved.num_maskable == int(batch.maskable.sum()) == 3 * 11


@pytest.mark.parametrize(("normalization", "count"), [("token", 33), ("sequence", 3), ("batch", 3)])
def test_divisors_ask_no_device(normalization, count):
    batch = random_batch(2).to(NOWHERE)
    noised = Noised(batch=batch, time=torch.ones(3, device=NOWHERE), masked=batch.maskable)
    found = CrossEntropy(normalization=normalization).count(noised)
    assert (found.dtype, found.device.type, float(found)) == (torch.float64, "cpu", count)


def test_another_batch_has_its_own_numbers():
    batch = random_batch(2).to(torch.device("cpu"))
    other = dataclasses.replace(batch, sample_ids=batch.sample_ids + 1, labels=batch.labels * 0 - 100)
    assert other.fingerprint != batch.fingerprint
    assert (other.num_maskable, other.host_lengths) == (0, (0, 0, 0))
