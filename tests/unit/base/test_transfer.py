"""Many tensors in one copy: what arrives is what was sent, and nothing more was sent than there is."""

import dataclasses

import pytest
import torch

from tide_megatron.base.transfer import as_bytes, from_bytes, moved, tensors_in

NOWHERE = torch.device("meta")


@dataclasses.dataclass(frozen=True)
class Inner:
    pair: tuple
    word: str = "kept"


TABLE = torch.arange(12).view(3, 4)
TENSORS = [
    torch.tensor([3, -(2**62)]),
    torch.tensor([0.1, float("nan")]),
    torch.tensor([True, False, True]),
    torch.empty(0, dtype=torch.int64),
    torch.empty(0, 5),
    torch.tensor(7, dtype=torch.int8),
    TABLE[:, 1:3],
    TABLE.t(),
    torch.arange(5).expand(4, -1),
    torch.tensor(2.5).expand(3),
    torch.tensor([1.5], dtype=torch.float64),
]


def test_tensors_of_all_kinds_come_back():
    found = from_bytes(as_bytes(TENSORS), TENSORS)
    for wanted, one in zip(TENSORS, found, strict=True):
        assert (one.dtype, one.shape) == (wanted.dtype, wanted.shape)
        torch.testing.assert_close(one, wanted, rtol=0, atol=0, equal_nan=True)


def test_what_is_repeated_is_sent_once():
    assert as_bytes([torch.arange(100).expand(1000, -1)]).numel() == 800


def test_a_value_is_moved_whole_and_shared_tensors_stay_shared():
    shared = torch.zeros(2)
    value = Inner((shared, [Inner((torch.ones(1), 5))], {"a": shared, "b": (), "none": None}))
    found = moved(value, NOWHERE)
    assert all(tensor.device == NOWHERE for tensor in tensors_in(found))
    assert found.pair[0] is found.pair[2]["a"]
    assert (found.word, found.pair[1][0].pair[1], found.pair[2]["none"]) == ("kept", 5, None)
    assert found.pair[1][0].pair[0].shape == (1,)


def test_on_the_cpu_nothing_is_done():
    value = Inner((torch.zeros(2),))
    assert moved(value, torch.device("cpu")) is value


@pytest.mark.parametrize("value", [Inner(()), [], {}, None, "word", 3])
def test_values_without_tensors_stay_what_they_are(value):
    assert moved(value, NOWHERE) == value
