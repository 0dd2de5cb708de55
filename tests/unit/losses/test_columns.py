"""Which columns are compared, and what is said when there are none."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from goldens.dense import loss_values
from tests.unit.losses.pairs import CLOCK, pair, rows_for
from tide_megatron.base.errors import ConfigError
from tide_megatron.losses.kl import Kl, ReverseKl
from tide_megatron.losses.tidal import Tidal

COMPARING = [Kl, ReverseKl, Tidal]


@pytest.mark.parametrize("kind", COMPARING)
@pytest.mark.parametrize("sizes", [(9, 7), (7, 9)])
def test_unequal_vocabularies_need_a_shared_size(kind, sizes):
    student, teacher = pair(vocabularies=sizes)
    with pytest.raises(ConfigError, match=r"shared_vocab_size.*at most 7.*calm"):
        loss_values(kind(teacher="t"), student, teacher, rows_for(student), CLOCK)


@pytest.mark.parametrize("kind", COMPARING)
def test_a_shared_size_beyond_a_vocabulary_is_refused(kind):
    student, teacher = pair(vocabularies=(9, 7))
    with pytest.raises(ConfigError, match=r"shared_vocab_size: 8 exceeds .* at most 7"):
        loss_values(kind(teacher="t", shared_vocab_size=8), student, teacher, rows_for(student), CLOCK)


@pytest.mark.parametrize("kind", COMPARING)
def test_unequal_vocabularies_with_a_shared_size(kind):
    """The bigger vocabulary's tail changes nothing, and gets no gradient."""
    student, teacher = pair(vocabularies=(9, 7))
    loss = kind(teacher="t", shared_vocab_size=6)
    values = loss_values(loss, student, teacher, rows_for(student), CLOCK)
    cut = loss_values(kind(teacher="t"), student[:, :6], teacher[:, :6], rows_for(student), CLOCK)
    assert torch.equal(values, cut)
    values.sum().backward()
    assert (student.grad[:, 6:] == 0).all()
    assert (student.grad[:, :6] != 0).any()


def test_columns_default_to_the_whole_vocabulary():
    assert Kl(teacher="t").columns(9, 9) == 9
    assert Kl(teacher="t", shared_vocab_size=9).columns(9, 12) == 9


@pytest.mark.parametrize("kind", COMPARING)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0),
        ("temperature", -1),
        ("temperature", float("inf")),
        ("weight", -1),
        ("shared_vocab_size", 0),
    ],
)
def test_wrong_options_are_refused_by_name(kind, field, value):
    with pytest.raises(ValidationError, match=field):
        kind(teacher="t", **{field: value})
