"""What a step needs: the student three times, teachers once, each in what it reads by lengths alone."""

from types import SimpleNamespace

import pytest
import torch

from tests.segments import numbers_of
from tests.unit.diffusion.sides import random_batch
from tests.unit.models.shapes import DENSE, MIXTURE, architecture
from tide_megatron.diffusion.mask import Context, allowed_pairs, dense_mask
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.diffusion.views import Complementary
from tide_megatron.models.architecture import body_flops, head_flops
from tide_megatron.teachers.teacher import ViewBuilder
from tide_megatron.train.cost import needed_flops


@pytest.mark.parametrize("share", [None, 0.5])
@pytest.mark.parametrize("name", ["t0", "shared"])
@pytest.mark.parametrize("kind", ["bidirectional", "block_causal", "block_diffusion"])
def test_what_is_read_is_what_the_view_holds(kind, name, share):
    noised = Noiser(seed=3).at(random_batch(4), 0.5)
    split = None if share is None else Complementary(seed=1, share=share)
    view_builder = ViewBuilder(context=Context(kind=kind, block_size=4), mask_id=0, complementary=split)
    (view,) = view_builder.views(name, noised)
    context, lengths = view_builder.reads(noised.reading(name).host_lengths)
    assert (context, len(lengths)) == (view.context, len(view.ids))
    real = torch.tensor(lengths)
    seen = int(dense_mask(view.context, view.length, numbers_of(real, view.length)).sum())
    pads = context.parts * int((view.length - real).sum())
    assert sum(allowed_pairs(context, length) for length in lengths) == seen - pads


def test_the_student_counts_three_times_and_each_teacher_once_in_its_own_tokens():
    contexts = Context(kind="block_diffusion", block_size=4), Context(kind="bidirectional")
    small, large = architecture(DENSE), architecture(MIXTURE)
    student = SimpleNamespace(model=SimpleNamespace(architecture=small), context=contexts[0])
    teacher = SimpleNamespace(
        model=SimpleNamespace(architecture=large), view_builder=ViewBuilder(context=contexts[1], mask_id=0)
    )
    microbatches = [Noiser(seed=3).at(random_batch(seed), 0.7) for seed in (1, 2)]
    rows = [int(noised.masked.sum()) for noised in microbatches]
    asked = [int(noised.reading("t0").targets.sum()) for noised in microbatches]
    assert rows != asked != [0, 0]
    expected = 0
    for number, theirs in zip(rows, asked, strict=True):
        expected += 3 * (body_flops(small, contexts[0], [14] * 3, number) + head_flops(small, number))
        expected += body_flops(large, contexts[1], [17] * 3, theirs) + head_flops(large, theirs)
    assert needed_flops(student, {"t0": teacher}, microbatches) == expected
