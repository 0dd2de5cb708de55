"""The arithmetic of MFU: written out by hand, and against what torch counts in a real forward pass."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.segments import numbers_of
from tests.unit.models.shapes import DENSE, LLADA_MOE, MIXTURE, architecture, build, view
from tide_megatron.diffusion.mask import Context, TwoViews, allowed_pairs, dense_mask
from tide_megatron.diffusion.views import view_of_parts
from tide_megatron.models.architecture import body_flops, head_flops
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout

CONTEXTS = [
    Context(kind="bidirectional"),
    *(Context(kind=kind, block_size=size) for kind in ("block_causal", "block_diffusion") for size in (1, 8)),
    TwoViews(kind="block_diffusion", block_size=8),
]


@pytest.mark.parametrize("length", [0, 1, 8, 21, 24])
@pytest.mark.parametrize("context", CONTEXTS, ids=str)
def test_pairs_are_those_of_the_mask(context, length):
    if length:
        assert allowed_pairs(context, length) == int(dense_mask(context, length).sum())
    else:
        assert allowed_pairs(context, length) == 0


@pytest.mark.parametrize("context", CONTEXTS, ids=str)
def test_pads_make_no_pairs(context):
    lengths, length = torch.tensor([21, 24, 5]), 24
    seen = int(dense_mask(context, length, numbers_of(lengths, length)).sum())
    pads = context.parts * int((length - lengths).sum())  # each sees itself, for the softmax's sake
    assert sum(allowed_pairs(context, real) for real in lengths.tolist()) == seen - pads


def test_a_dense_model_by_hand():
    """DENSE: 2 layers, 32 wide, 4 heads of 16 over 2 groups, feed-forward 48, 61 ids."""
    context = Context(kind="block_diffusion", block_size=4)
    tokens, pairs, rows = 2 * (8 + 4), 2 * (4 * 4 + 4 * 8) + 2 * (4 * 4), 5
    queries, keys_and_values, out = 2 * 32 * 64, 2 * 2 * 32 * 32, 2 * 64 * 32
    attention = tokens * (queries + keys_and_values + out) + pairs * (2 * 64 + 2 * 64)
    feed_forward = 3 * 2 * 32 * 48
    expected = 2 * attention + tokens * feed_forward + rows * feed_forward
    assert body_flops(architecture(DENSE), context, [8, 4], rows) == expected == 922_624
    assert head_flops(architecture(DENSE), rows) == 5 * 2 * 32 * 61


def test_a_mixture_by_hand():
    """MIXTURE: a dense layer of 80, then two of 8 experts of 24, 4 a token, and a shared one of 24."""
    context, tokens, rows = Context(kind="bidirectional"), 6, 2
    attention = tokens * (2 * 32 * 64 + 2 * 2 * 32 * 32 + 2 * 64 * 32) + 6 * 6 * 4 * 64
    router, chosen, shared = 2 * 32 * 8, 4 * 3 * 2 * 32 * 24, 3 * 2 * 32 * 24
    mixture = router + chosen + shared
    expected = 3 * attention + tokens * 3 * 2 * 32 * 80 + tokens * mixture + rows * mixture
    assert body_flops(architecture(MIXTURE), context, [6], rows) == expected


def counted(config, context, length, rows, trained):
    """Return what torch counts in a pass through a real model, and what we do for as many pairs."""
    model = build(config, make_groups(Layout()), attention="dense", trainable=trained)
    ids = view(50, length=length, kind=context.kind).ids[:, : context.parts * length]
    given = view_of_parts(ids, context, None, torch.arange(rows) * 3)
    plain = sdpa_kernel(SDPBackend.MATH)  # torch counts attention on CPU only where it is matrix products
    with plain, FlopCounterMode(display=False) as counter, torch.set_grad_enabled(trained):
        hidden = model(given)
        if trained:
            hidden.square().sum().backward()
    whole = Context(kind="bidirectional")
    scored = 2 * allowed_pairs(whole, context.parts * length)  # torch counts the pairs that the mask forbids
    allowed = 2 * allowed_pairs(context, length)
    shape = model.architecture
    forbidden = shape.layers * 4 * shape.heads * shape.head_dim * (scored - allowed)
    return counter.get_total_flops(), body_flops(shape, context, [length] * 2, rows), forbidden


@pytest.mark.parametrize("kind", ["bidirectional", "block_causal", "block_diffusion"])
@pytest.mark.parametrize("config", [DENSE, MIXTURE, LLADA_MOE], ids=["dense", "mixture", "llada moe"])
def test_torch_counts_the_same_in_a_forward_pass(pool, config, kind):
    context = Context(kind=kind, block_size=8)
    ((seen, ours, forbidden),) = pool(1).run(counted, config, context, 24, 7, False)
    assert seen == ours + forbidden


def test_torch_counts_three_times_as_much_in_training(pool):
    ((seen, ours, forbidden),) = pool(1).run(counted, DENSE, Context(kind="bidirectional"), 24, 7, True)
    assert forbidden == 0
    assert seen == 3 * ours
