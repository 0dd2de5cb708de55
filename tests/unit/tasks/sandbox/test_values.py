"""Values between processes: plain ones arrive as they were, others equal nothing."""

from __future__ import annotations

import collections
import json
import math
from decimal import Decimal
from fractions import Fraction

import pytest

from tide_megatron.tasks.sandbox.inside.values import decode, encode

PLAIN = [
    None, True, False, 0, -7, 10**5000, 1.5, float("inf"), -0.0, 2j, "", "ä\ud800", b"\0\xff",
    [], (), {}, set(), [1, (2, [3])], {"a": [1], 2: (None,), (1, 2): {3}}, frozenset({1}), range(3, 9, 2),
    Fraction(1, 3), Decimal("1.10"),
]  # fmt: skip


def sent(value):
    return decode(json.loads(json.dumps(encode(value))))


@pytest.mark.parametrize("value", PLAIN, ids=map(str, range(len(PLAIN))))
def test_plain_values_arrive_with_their_types(value):
    there = sent(value)
    assert there == value
    assert type(there) is type(value)


def test_what_equality_does_not_tell():
    assert math.isnan(sent(float("nan")))
    assert math.copysign(1, sent(-0.0)) == -1
    assert list(sent(iter([1, 2]))) == [1, 2]
    assert sent({1: 2}.keys()) == {1}
    assert list(sent({1: 2}.values())) == [2]


def test_subclasses_arrive_as_their_base():
    class Sly(int):
        def __eq__(self, other):
            return True

        __hash__ = int.__hash__

    assert sent(Sly(3)) == 3
    assert sent(Sly(3)) != 4
    assert type(sent(collections.OrderedDict(a=1))) is dict
    assert sent(collections.namedtuple("Point", "x y")(1, 2)) == (1, 2)


def test_other_objects_equal_nothing():
    there = sent(object())
    assert there != there  # noqa: PLR0124
    assert there != sent(object())
    assert repr(there) == "<object>"
