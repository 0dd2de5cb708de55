"""Models of routing: every copy finds an expert, none gets a token twice, skew is as asked."""

import pytest

from tide_megatron.plan.routing import LayerCall, Recorded, Zipf

PLACE = LayerCall(model="moe", layer=3, call=0, experts=16, copies=4)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("tokens", [1, 7, 512])
def test_all_copies_are_dealt_out(exponent, tokens):
    for rank in range(3):
        counts = Zipf(exponent).counts(PLACE, rank, tokens)
        assert sum(counts) == 4 * tokens
        assert min(counts) >= 0
        assert max(counts) <= tokens


def test_balanced_differs_by_one_copy():
    counts = Zipf().counts(PLACE, 1, 7)
    assert set(counts) == {1, 2}


def test_zipf_is_as_skewed_as_its_law():
    counts = sorted(Zipf(exponent=1.0).counts(PLACE, 0, 4096), reverse=True)
    weights = [1 / (expert + 1) for expert in range(16)]
    expected = [4 * 4096 * weight / sum(weights) for weight in weights]
    assert counts[1] == pytest.approx(expected[1], rel=0.2)  # the first is capped at one copy a token
    assert counts[-1] == pytest.approx(expected[-1], rel=0.2)


def test_what_was_recorded_is_replayed():
    routing = Recorded(by_rank=[{("moe", 3): [[1, 2], [3, 4]]}, {("moe", 3): [[5, 6], [7, 8]]}])
    assert routing.counts(LayerCall(model="moe", layer=3, call=1, experts=2, copies=1), 1, 9) == [7, 8]
