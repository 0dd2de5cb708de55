"""Intervals against tables, the sign test against counting, comparisons by question."""

import pytest

from tide_megatron.base.errors import DataError
from tide_megatron.tasks.scores import MeanScore, compare, wilson


@pytest.mark.parametrize(
    ("right", "questions", "low", "high"),
    [  # R's binom::binom.confint(method = "wilson")
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (80, 164, 0.4124, 0.5638),
    ],
)
def test_wilson(right, questions, low, high):
    assert wilson(right / questions, questions) == pytest.approx((low, high), abs=2e-4)


def test_a_share_has_wilsons_interval_and_other_scores_students():
    assert MeanScore.of([1.0, 0.0] * 5).low == pytest.approx(0.2366, abs=1e-4)
    mixed = MeanScore.of([0.5, 0.6, 0.7])
    half = 4.3027 * 0.1 / 3**0.5  # Student's t of two degrees of freedom
    assert (mixed.low, mixed.high) == pytest.approx((0.6 - half, 0.6 + half), abs=1e-4)
    assert MeanScore.of([0.0, 0.5]).low == 0.0
    with pytest.raises(DataError, match="no question was answered"):
        MeanScore.of([])


def test_percent_is_what_tables_show():
    assert MeanScore.of([1.0] * 80 + [0.0] * 84).percent() == "48.8 [41.2, 56.4]"


def test_two_models_are_compared_on_what_both_answered():
    one = {"a": 1.0, "b": 1.0, "c": 0.0, "d": 1.0, "only": 1.0}
    other = {"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.0, "more": 1.0}
    found = compare(one, other)
    assert (found.better, found.worse, found.difference.pairs) == (3, 0, 4)
    assert found.difference.mean == 0.75
    assert found.sign_test == pytest.approx(2 / 2**3)
    assert compare(one, one).sign_test == 1.0
    with pytest.raises(DataError, match="no question in common"):
        compare(one, {"else": 1.0})
