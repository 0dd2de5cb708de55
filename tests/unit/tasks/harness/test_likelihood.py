"""Bounds against a sum over all subsets in plain torch, and what the draws promise."""

import itertools
import math

from tide_megatron.platform.distributed import start_distributed, stop_distributed

import pytest
import torch

from tests.small_task import write_student
from tide_megatron.base.device import choose_device
from tide_megatron.decode.opening import open_decoder
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.views import View
from tide_megatron.tasks.harness.likelihood import Likelihoods


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    device = choose_device("cpu")
    start_distributed(device)
    yield open_decoder(write_student(tmp_path_factory.mktemp("student"), block_size=4), device)
    stop_distributed()


def estimator(decoder, **options):
    tokenizer = decoder.tokenizer
    chosen = {"context": decoder.context, "mask_id": tokenizer.mask_id, "pad_id": tokenizer.pad_id}
    return Likelihoods(**(chosen | {"model": decoder.model} | options))


def plain_bound(decoder, before, tokens, context):
    """Sum over all subsets; each block is read behind clean blocks, its unknown rest masked."""
    mask, total = decoder.tokenizer.mask_id, 0.0
    block = 10**6 if context.kind == "bidirectional" else context.block_size
    text = [*before, *tokens]
    for size in range(1, len(tokens) + 1):
        for subset in itertools.combinations(range(len(tokens)), size):
            places = [len(before) + place for place in subset]
            for first in range(0, len(text), block):
                own = [place for place in places if first <= place < first + block]
                if not own:
                    continue
                end = first + block if block < 10**6 else len(text)
                shown = [mask if place in own else token for place, token in enumerate(text[:end])]
                shown += [mask] * (end - len(shown))
                at = torch.arange(end)
                kind = "bidirectional" if block == 10**6 else "block_causal"
                view = View(
                    ids=torch.tensor([shown]),
                    positions=at[None],
                    context=Context(kind=kind, block_size=min(block, 8)),
                    length=end,
                    segments=None,
                    rows=torch.tensor(own),
                )
                with torch.no_grad():
                    logits = (decoder.model.rows(view) @ decoder.model.head_weight.T).double()
                gold = logits.log_softmax(-1)[torch.arange(len(own)), [text[place] for place in own]]
                total += float(gold.sum()) / (size * math.comb(len(tokens), size))
    return total


@pytest.mark.parametrize("kind", ["block_diffusion", "bidirectional"])
def test_a_short_continuation_is_exact(decoder, kind):
    context = Context(kind=kind, block_size=4)
    pairs = [([5, 6, 7, 8, 9], [10, 11, 12, 13]), ([], [20, 21]), ([5, 6], [30])]
    found = estimator(decoder, context=context, draws=15, batch=5).estimate(pairs)
    for one, (before, tokens) in zip(found, pairs, strict=True):
        assert one.value == pytest.approx(plain_bound(decoder, before, tokens, context), abs=1e-4)
        assert one.standard_error == 0.0


def test_draws_come_near_the_exact_bound_and_say_how_near(decoder):
    pair = ([5, 6, 7], [10, 11, 12, 13, 14, 15])
    [exact] = estimator(decoder, draws=2**6).estimate([pair])
    drawn = [estimator(decoder, draws=16, seed=seed).estimate([pair])[0] for seed in range(12)]
    errors = [(one.value - exact.value) / one.standard_error for one in drawn]
    assert max(map(abs, errors)) < 5
    assert abs(sum(errors)) / 12**0.5 < 3  # no bias
    assert len({one.value for one in drawn}) == 12


def test_an_estimate_is_a_pure_function_of_seed_and_tokens(decoder):
    pairs = [([5, 6, 7], [10, 11, 12, 13, 14, 15]), ([7], [40, 41, 42, 43, 44, 45, 46])]
    together = estimator(decoder, draws=8, batch=16).estimate(pairs)
    apart = [estimator(decoder, draws=8, batch=3).estimate([pair])[0] for pair in reversed(pairs)]
    for one, other in zip(together, reversed(apart), strict=True):
        assert one.value == pytest.approx(other.value, abs=1e-4)


def test_greedy_means_every_token_is_the_likeliest_when_all_are_masked(decoder):
    before, mask = [5, 6], decoder.tokenizer.mask_id
    view = View(
        ids=torch.tensor([[*before, mask, mask]]),
        positions=torch.arange(4)[None],
        context=Context(kind="block_causal", block_size=4),
        length=4,
        segments=None,
        rows=torch.tensor([2, 3]),
    )
    with torch.no_grad():
        likeliest = (decoder.model.rows(view) @ decoder.model.head_weight.T).argmax(-1).tolist()
    other = [likeliest[0], (likeliest[1] + 1) % 300]
    found = estimator(decoder).estimate([(before, likeliest), (before, other)])
    assert [one.is_greedy for one in found] == [True, False]
