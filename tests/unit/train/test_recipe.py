"""Cutting an update over ranks and microbatches."""

import pytest

from tide_megatron.base.errors import ConfigError
from tide_megatron.train.recipe import BatchOptions


@pytest.mark.parametrize(
    ("samples", "microbatch", "world", "wanted"),
    [
        (64, None, 1, (64, 1)),
        (64, None, 4, (16, 1)),
        (64, 4, 4, (4, 4)),
        (64, 100, 4, (16, 1)),  # never more than a rank's share
        (6, 1, 3, (1, 2)),
        (3, None, 3, (1, 1)),
    ],
)
def test_an_update_is_cut_evenly(samples, microbatch, world, wanted):
    batch = BatchOptions(samples=samples, microbatch=microbatch)
    size, accumulate = batch.accumulation(world)
    assert (size, accumulate) == wanted
    assert size * accumulate * world == samples


@pytest.mark.parametrize(
    ("samples", "world", "good"), [(6, 4, 8), (5, 4, 4), (1, 4, 4), (64, 3, 63), (9, 8, 8), (15, 8, 16)]
)
def test_a_batch_that_ranks_cannot_share_names_the_nearest_that_they_can(samples, world, good):
    said = rf"^batch\.samples: {samples} samples .* by {world} ranks; use {good}, or another number of ranks$"
    with pytest.raises(ConfigError, match=said):
        BatchOptions(samples=samples).accumulation(world)
    BatchOptions(samples=good).accumulation(world)


@pytest.mark.parametrize(("microbatch", "good"), [(3, 2), (5, 4), (7, 4)])
def test_a_microbatch_that_does_not_divide_a_share_names_one_that_does(microbatch, good):
    said = rf"^batch\.microbatch: {microbatch} does not divide the 16 samples .* 2 ranks .*; use {good}$"
    with pytest.raises(ConfigError, match=said):
        BatchOptions(samples=32, microbatch=microbatch).accumulation(2)
    BatchOptions(samples=32, microbatch=good).accumulation(2)
