"""Sums over segments: what `index_add` gives on CPU bit for bit, in an order that no device changes."""

import pytest
import torch

from tests.operations import Repeated
from tide_megatron.base.segments import segment_sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(200,), (200, 3)])
def test_sums_and_gradients_are_those_of_index_add(dtype, shape):
    values = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1), requires_grad=True)
    segment = torch.randint(0, 37, (200,), generator=torch.Generator().manual_seed(2)).sort().values
    sums, expected = (
        segment_sums(values, segment, 40),
        torch.zeros(40, *shape[1:], dtype=dtype).index_add(0, segment, values),
    )
    assert torch.equal(sums, expected)
    slopes = torch.autograd.grad(sums.square().sum(), values)
    assert torch.equal(slopes[0], torch.autograd.grad(expected.square().sum(), values)[0])


def test_there_may_be_nothing():
    nothing = torch.zeros(0, dtype=torch.int64)
    assert segment_sums(torch.zeros(0), nothing, 3).tolist() == [0.0] * 3
    assert segment_sums(torch.zeros(0), nothing, 0).tolist() == []


def test_segments_out_of_order_are_refused():
    with pytest.raises(AssertionError, match="ascend"):
        segment_sums(torch.ones(3), torch.tensor([0, 2, 1]), 3)


def test_no_number_is_asked_of_the_device_and_nothing_is_added_twice_to_one_place():
    values = torch.ones(4, requires_grad=True)
    on_meta = segment_sums(values.to("meta"), torch.zeros(4, dtype=torch.int64, device="meta"), 2)
    assert on_meta.shape == (2,)
    with Repeated() as repeated:
        segment_sums(values, torch.tensor([0, 0, 1, 1]), 2).sum().backward()
    assert not repeated.names
    with Repeated() as repeated:
        torch.zeros(2).index_add(0, torch.tensor([0, 0, 1, 1]), values)
    assert repeated.names == {"index_add"}
