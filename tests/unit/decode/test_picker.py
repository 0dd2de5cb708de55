"""The head at masked positions against plain softmax, and draws against the distribution they are from."""

import pytest
import torch

from tide_megatron.decode import picker as module
from tide_megatron.decode.options import Decoding
from tide_megatron.decode.picker import Asked, Picker

WEIGHT = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
HIDDEN = torch.randn(9, 16, generator=torch.Generator().manual_seed(2))
BLIND = torch.randn(9, 16, generator=torch.Generator().manual_seed(3))
NEVER = [3, 38, 39]


def asked(count, number=0):
    return Asked(numbers=[number] * count, positions=list(range(count)), forwards=[0] * count)


def pick(hidden=HIDDEN, blind=None, never=NEVER, number=0, **words):
    return Picker(WEIGHT, never, Decoding(**words))(hidden, blind, asked(len(hidden), number))


@pytest.mark.parametrize("part", [None, 1, 4])
@pytest.mark.parametrize("guidance", [0.0, 0.7])
def test_token_confidence_and_entropy_are_the_softmaxs(monkeypatch, part, guidance):
    if part:
        monkeypatch.setattr(module, "_LOGIT_BYTES", part * 4 * len(WEIGHT))
    blind = BLIND if guidance else None
    tokens, confidence, entropy = pick(blind=blind, schedule="entropy", guidance=guidance)
    logits = HIDDEN.double() @ WEIGHT.double().T
    if guidance:
        unseen = BLIND.double() @ WEIGHT.double().T
        logits = unseen + (guidance + 1) * (logits - unseen)
    logits[:, NEVER] = -torch.inf
    shares = logits.softmax(dim=-1)
    assert tokens == shares.argmax(dim=-1).tolist()
    torch.testing.assert_close(torch.tensor(confidence), shares.amax(dim=-1).float())
    wanted = torch.special.entr(shares).sum(dim=-1)
    torch.testing.assert_close(torch.tensor(entropy), wanted.float(), rtol=1e-4, atol=1e-5)
    assert pick(blind=blind, guidance=guidance)[:2] == (tokens, confidence)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.5, 0.6)])
def test_draws_have_the_distribution_they_are_from(temperature, top_p):
    hidden = 0.4 * HIDDEN[:1].expand(4000, -1)
    tokens, confidence, _ = pick(hidden, temperature=temperature, top_p=top_p)
    logits = 0.4 * HIDDEN[0] @ WEIGHT.T
    logits[NEVER] = -torch.inf
    shares = (logits / temperature).softmax(dim=-1)
    ordered, order = shares.sort(descending=True)
    kept = order[: int((ordered.cumsum(0) < top_p).sum()) + 1]
    wanted = torch.zeros(40).index_copy(0, kept, shares[kept]) / shares[kept].sum()
    found = torch.bincount(torch.tensor(tokens), minlength=40) / len(tokens)
    assert not found[wanted == 0].any()
    deviation = (wanted * (1 - wanted) / len(tokens)).sqrt()
    assert ((found - wanted).abs() <= 4.5 * deviation + 1e-9).all()
    own = logits.softmax(dim=-1)[torch.tensor(tokens)]
    torch.testing.assert_close(torch.tensor(confidence), own, rtol=1e-4, atol=1e-6)


def test_a_draw_does_not_depend_on_what_is_drawn_beside_it(monkeypatch):
    whole = pick(temperature=2.0)[0]
    monkeypatch.setattr(module, "_LOGIT_BYTES", 2 * 4 * len(WEIGHT))
    assert pick(temperature=2.0)[0] == whole
    assert pick(temperature=2.0, number=1)[0] != whole
    assert pick(temperature=2.0, seed=1)[0] != whole


def test_a_sure_draw_is_the_argmax():
    assert pick(temperature=1e-4)[0] == pick()[0] == pick(temperature=5.0, top_p=1e-6)[0]
