"""What a teacher reads, by lengths alone, is what its views hold."""

import pytest
import torch

from tests.unit.diffusion.sides import random_batch
from tide_megatron.diffusion.complementary import Complementary
from tide_megatron.diffusion.mask import Context, allowed_pairs, dense_mask
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.teachers.sight import Sight


@pytest.mark.parametrize("share", [None, 0.5])
@pytest.mark.parametrize("name", ["t0", "shared"])
@pytest.mark.parametrize("kind", ["bidirectional", "block_causal", "block_diffusion"])
def test_what_is_read_is_what_the_view_holds(kind, name, share):
    noised = Noiser(seed=3).at(random_batch(4), 0.5)
    split = None if share is None else Complementary(seed=1, share=share)
    sight = Sight(context=Context(kind=kind, block_size=4), mask_id=0, complementary=split)
    (view,) = sight.views(name, noised)
    context, lengths = sight.reads(noised.reading(name).host_lengths)
    assert (context, len(lengths)) == (view.context, len(view.ids))
    real = torch.tensor(lengths)
    seen = int(dense_mask(view.context, view.length, real).sum())
    pads = context.parts * int((view.length - real).sum())
    assert sum(allowed_pairs(context, length) for length in lengths) == seen - pads
