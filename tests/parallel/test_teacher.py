"""A teacher's answer: complementary views in one forward are those in two, and rows keep their places."""

import dataclasses

import pytest
import torch

from tests.unit.diffusion.sides import random_batch
from tests.unit.models.shapes import DENSE, MIXTURE, build
from tide_megatron.diffusion.complementary import Complementary
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout
from tide_megatron.teachers.teacher import Sight, Teacher

MASK = 60
CONFIGS = {"dense": DENSE, "mixture": MIXTURE}
KINDS = ("bidirectional", "block_causal", "block_diffusion")
LENGTH = 44


def answers(config, kind, name, attention, expert, time):
    """Return the rows in one forward, in two, and of the plain view; each [rows, hidden], on this rank."""
    model = build(
        config, make_groups(Layout(expert=expert)), layout=Layout(expert=expert), attention=attention
    )
    batch = random_batch(3, length=LENGTH, teacher_length=LENGTH + 3)
    side = batch.sides["t0"]
    lengths = torch.tensor([LENGTH + 3, LENGTH - 10, LENGTH - 4])
    kept = side.spans[:, 3] <= lengths[side.sample]
    side = dataclasses.replace(
        side, lengths=lengths, spans=side.spans[kept], sample=side.sample[kept], number=side.number[kept]
    )
    noised = Noiser(seed=2).at(dataclasses.replace(batch, sides={"t0": side}), time)
    sight = Sight(context=Context(kind=kind, block_size=8), mask_id=MASK)
    split = dataclasses.replace(sight, complementary=Complementary(seed=5))
    sights = (split, dataclasses.replace(split, forwards=2), sight)
    return [Teacher(name, model, sight).answer(noised).hidden for sight in sights]


@pytest.mark.parametrize("attention", ["structured", "dense"])
@pytest.mark.parametrize("name", ["t0", "shared"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS)
def test_one_forward_is_two_passes(pool, config, kind, name, attention):
    one, two, plain = pool(1).run(answers, CONFIGS[config], kind, name, attention, 1, 0.6)[0]
    assert one.shape == two.shape == plain.shape
    assert len(one) > 10
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    assert (one - plain).abs().max() > 1e-2, "showing half of the hidden tokens changes nothing?"


@pytest.mark.parametrize("kind", KINDS)
def test_experts_over_ranks_answer_alike(pool, kind):
    wanted = pool(1).run(answers, MIXTURE, kind, "t0", "structured", 1, 0.6)[0]
    for found in pool(2).run(answers, MIXTURE, kind, "t0", "structured", 2, 0.6):
        for got, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["t0", "shared"])
def test_nothing_hidden_still_passes_through_the_model(pool, name):
    for found in pool(2).run(answers, MIXTURE, "block_diffusion", name, "structured", 2, 0.0):
        assert [len(rows) for rows in found[1:]] == [0, 0]
