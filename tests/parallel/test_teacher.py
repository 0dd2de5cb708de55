"""A teacher's answer: complementary views in one forward are those in two, rows keep their places, and every
layout brings every rank of a group group what one rank alone would have answered about all its sources."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from tests.unit.diffusion.sides import random_batch
from tests.unit.models.shapes import DENSE, DREAM, MIXTURE, build
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.diffusion.views import Complementary
from tide_megatron.models.flex import CompiledFlex
from tide_megatron.parallel.collectives import gather_objects
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout
from tide_megatron.parallel.vocab_group import make_across, make_vocab_group
from tide_megatron.teachers.exchange import Route
from tide_megatron.teachers.teacher import Teacher, ViewBuilder

MASK = 60
CONFIGS = {"dense": DENSE, "mixture": MIXTURE, "shifted": DREAM}
KINDS = ("bidirectional", "block_causal", "block_diffusion")
LENGTH = 44


def noised_batch(seed, time):
    """Return three samples with a side `t0`, hidden at a noise level; lengths vary, also between seeds.

    Every second seed has lengths in whole blocks of 8, whose pads a block context cannot see.
    """
    batch = random_batch(seed, length=LENGTH, teacher_length=LENGTH + 3)
    side = batch.sides["t0"]
    lengths = torch.tensor([LENGTH + 3, LENGTH - 10 - seed % 5, LENGTH - 4]) - 8 * (seed % 3)
    lengths = lengths // 8 * 8 if seed % 2 else lengths
    kept = side.spans[:, 3] <= lengths[side.sample]
    side = dataclasses.replace(
        side, lengths=lengths, spans=side.spans[kept], sample=side.sample[kept], number=side.number[kept]
    )
    return Noiser(seed=2).at(dataclasses.replace(batch, sides={"t0": side}), time)


def answer(teacher, microbatches, group):
    """Ask for some microbatches, as a step does; return the group group's rows of each, [rows, hidden]."""
    request = teacher.request(microbatches)
    told = gather_objects(request.numbers(), group.group) if group.group else [request.numbers()]
    sizes = [request.sizes(numbers) for numbers in told]
    return [heard.hidden for heard in teacher.hidden_states(request, sizes)]


def teacher_of(config, layout, view_builder, name, group, **options):
    model = build(config, make_groups(layout), layout=layout, **options)
    across = make_across(layout, group.size)
    route = Route(layout=layout, replica=model.groups.mp, across=across, rank=group.rank)
    return Teacher(name, model, view_builder, route, shared_schedule=2)


def answers(config, kind, name, attention, expert, time):
    """Return the rows in one forward, in two, and of the plain view; each [rows, hidden], on this rank."""
    layout, group = Layout(expert=expert), make_vocab_group([1000], 1)
    view_builder = ViewBuilder(context=Context(kind=kind, block_size=8), mask_id=MASK)
    split = dataclasses.replace(view_builder, complementary=Complementary(seed=5))
    teacher = teacher_of(config, layout, view_builder, name, group, attention=attention)
    found = []
    for teacher.view_builder in (split, dataclasses.replace(split, forwards=2), view_builder):
        found += answer(teacher, [noised_batch(3, time)], group)
    return found


@pytest.mark.parametrize("attention", ["structured", "dense"])
@pytest.mark.parametrize("name", ["t0", "shared"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS)
def test_one_forward_is_two_passes(pool, config, kind, name, attention):
    one, two, plain = pool(1).run(answers, CONFIGS[config], kind, name, attention, 1, 0.6)[0]
    assert one.shape == two.shape == plain.shape
    assert len(one) > 10
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    assert (one - plain).abs().max() > 1e-2, "showing half of the masked tokens changes nothing?"


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


CUTS = {  # name -> (ranks, config, layout, group ranks)
    "TP2xPP2": (4, DENSE, Layout(tensor=2, pipeline=2), 4),
    "TP2, two replicas": (4, DENSE, Layout(tensor=2), 4),
    "TP2, heads over 2": (4, MIXTURE, Layout(tensor=2), 2),
    "TP2xPP2, shifted": (4, DREAM, Layout(tensor=2, pipeline=2), 4),
    "PP2, two replicas": (4, DENSE, Layout(pipeline=2), 4),
    "PP2xEP2": (4, MIXTURE, Layout(pipeline=2, expert=2), 2),
    "TP2xEP2": (4, MIXTURE, Layout(tensor=2, expert=2), 4),
    "EP4, heads over 4": (4, MIXTURE, Layout(expert=4), 4),
    "EP2, heads over 1": (2, MIXTURE, Layout(expert=2), 1),
    "TP2xPP2, two replicas": (8, DENSE, Layout(tensor=2, pipeline=2), 8),
    "PP2xEP4": (8, MIXTURE, Layout(pipeline=2, expert=4), 4),
}
TIMES = (0.6, 0.0, 0.3)
"""Of the microbatches: three share two schedules, and one of them hides nothing."""


def source_microbatches(rank):
    """Return a rank's own microbatches; the first rank hides nothing at all."""
    return [noised_batch(10 * rank + index, time * (rank > 0)) for index, time in enumerate(TIMES)]


def group_answers(config, layout, head_ranks, kind, forwards, *, make_kernel=None):
    group = make_vocab_group([1000], head_ranks)
    view_builder = ViewBuilder(
        context=Context(kind=kind, block_size=8),
        mask_id=MASK,
        complementary=Complementary(seed=5) if forwards else None,
        forwards=forwards or 1,
    )
    teacher = teacher_of(config, layout, view_builder, "t0", group, attention="structured")
    if make_kernel is not None:
        teacher.model.make_kernel = make_kernel
    return answer(teacher, source_microbatches(dist.get_rank()), group), range(
        group.first, group.first + group.size
    )


def each_alone(config, kind, forwards, ranks):
    """Return what one rank answers about every source's microbatches."""
    view_builder = ViewBuilder(
        context=Context(kind=kind, block_size=8),
        mask_id=MASK,
        complementary=Complementary(seed=5) if forwards else None,
        forwards=forwards or 1,
    )
    group = make_vocab_group([1000], 1)
    teacher = teacher_of(config, Layout(), view_builder, "t0", group, attention="structured")
    return [answer(teacher, source_microbatches(rank), group) for rank in range(ranks)]


@pytest.mark.parametrize(
    ("kind", "forwards"), [("bidirectional", 0), ("block_diffusion", 1), ("block_causal", 2)]
)
@pytest.mark.parametrize("name", CUTS)
def test_every_place_hears_what_each_seat_asked(pool, name, kind, forwards):
    ranks, config, layout, head_ranks = CUTS[name]
    (alone,) = pool(1).run(each_alone, config, kind, forwards, ranks)
    assert sum(len(rows) for rows in alone[1]) > 20
    for found, places in pool(ranks).run(group_answers, config, layout, head_ranks, kind, forwards):
        assert len(found) == len(TIMES)
        for microbatch, rows in enumerate(found):
            wanted = torch.cat([alone[place][microbatch] for place in places])
            torch.testing.assert_close(rows, wanted, rtol=1e-5, atol=1e-5)


def group_answers_by_flex(*args):
    """Answer with FlexAttention as on CUDA, traced and not compiled; count the shapes of this rank."""
    make = CompiledFlex("teacher", backend="eager")
    return *group_answers(*args, make_kernel=make), make.compilations


@pytest.mark.parametrize(
    ("name", "kind", "forwards"), [("TP2xPP2", "block_diffusion", 1), ("PP2xEP2", "bidirectional", 0)]
)
def test_stages_agree_on_the_shapes_that_flex_attention_rounds_up_to(pool, name, kind, forwards):
    ranks, config, layout, head_ranks = CUTS[name]
    (alone,) = pool(1).run(each_alone, config, kind, forwards, ranks)
    for found, places, compilations in pool(ranks).run(
        group_answers_by_flex, config, layout, head_ranks, kind, forwards
    ):
        for microbatch, rows in enumerate(found):
            wanted = torch.cat([alone[place][microbatch] for place in places])
            torch.testing.assert_close(rows, wanted, rtol=1e-5, atol=1e-5)
        # Views of 20 to 47 tokens have one length; where the last block is not full, its pads are hidden.
        assert compilations == (1 if kind == "bidirectional" else 2)
