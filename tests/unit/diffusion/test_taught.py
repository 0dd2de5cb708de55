"""Teachers that teach some samples of a microbatch: they read these, and their rows join the whole's."""

import itertools

import pytest
import torch

from tests.tiny_run import write_cross_run
from tide_megatron.base.device import choose_device
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.diffusion.views import Complementary
from tide_megatron.losses.rows import rows_of
from tide_megatron.teachers.teacher import ViewBuilder
from tide_megatron.train.resolve import load_recipe
from tide_megatron.train.setup import examine

SAMPLES = [3, 11, 7, 30, 21, 0]
CONTEXT = Context(kind="block_diffusion", block_size=8)
PARTS = [(0, 2, 5), (1,), (3, 4), (0, 1, 2, 3, 4, 5), ()]


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    file = write_cross_run(tmp_path_factory.mktemp("cross"))
    recipe, _ = load_recipe(file)
    return examine(recipe, choose_device("cpu"), (0, 1)).data["train"]


def noised_of(loader, samples, taught=None):
    batch = loader.batch_of(samples)
    if taught is not None:
        flags = tuple(place in taught for place in range(len(samples)))
        object.__setattr__(batch, "taught", {"moe": flags, "own": flags})
    return Noiser(seed=5, whole_chunks_of=("own",))(batch)


@pytest.mark.parametrize(("part", "name"), itertools.product(PARTS[:-1], ("moe", "own")))
def test_a_part_is_read_as_if_it_were_the_microbatch(loader, part, name):
    whole, alone = noised_of(loader, SAMPLES, part), noised_of(loader, [SAMPLES[place] for place in part])
    for complementary in (None, Complementary(seed=3)):
        builder = ViewBuilder(context=CONTEXT, mask_id=1, complementary=complementary)
        (got,), (wanted,) = builder.views(name, whole), builder.views(name, alone)
        assert len(got.ids) == len(wanted.ids)
        assert torch.equal(got.ids.flatten()[got.rows], wanted.ids.flatten()[wanted.rows])
    got, wanted = whole.reading(name), alone.reading(name)
    assert torch.equal(got.ids[got.index], wanted.ids[wanted.index])
    assert got.host_lengths == wanted.host_lengths


@pytest.mark.parametrize(("part", "name"), itertools.product(PARTS, ("moe", "own")))
def test_its_rows_join_those_of_the_whole_microbatch(loader, part, name):
    whole = noised_of(loader, SAMPLES, part)
    rows, link = rows_of(whole), whole.link(name)
    everything = noised_of(loader, SAMPLES).link(name)
    chosen = torch.tensor(part, dtype=torch.int64)
    assert link.num_pairs == int(torch.isin(everything.pair_sample, chosen).sum())
    assert link.num_chunks == int(torch.isin(everything.chunk_sample, chosen).sum())
    assert torch.equal(rows.links[name].gold, link.gold)
    assert set(link.pair_sample.tolist()) <= set(part)
    ours, theirs = link.pairs
    assert torch.equal(rows.sample[ours], link.pair_sample)
    assert torch.equal(rows.gold[ours], link.gold[theirs]), "a pair predicts one token"
    row, chunk = link.student_rows
    assert torch.equal(rows.sample[row], link.chunk_sample[chunk])
    assert len(link.gold) == len(whole.reading(name).index[0])


def test_without_a_sample_one_is_read_and_nothing_asked(loader):
    whole = noised_of(loader, SAMPLES, ())
    (view,) = ViewBuilder(context=Context(kind="block_diffusion", block_size=8), mask_id=1).views(
        "moe", whole
    )
    assert (len(view.ids), len(view.rows)) == (1, 0)
