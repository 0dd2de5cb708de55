"""A world of one: collectives are told and answered, and nothing of it stays behind."""

import tide_megatron.platform
from tide_megatron.platform.lone_world import Call, Listener, PlannedDevice, lone_world

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings

from tide_megatron.base.device_kind import kind_of
from tide_megatron.parallel.collectives import all_agree, gather_objects, gather_vectors, sum_over
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout


def heard_in(rank, size, act, kind="cuda", peers=lambda tensor, ranks: None):
    calls = []
    with lone_world(PlannedDevice.of(kind), rank, size, Listener(on_call=calls.append, peers=peers)):
        answer = act()
    return answer, calls


def test_a_rank_of_4096_has_its_groups():
    def act():
        groups = make_groups(Layout(tensor=2, pipeline=2, expert=8))
        return [dist.get_process_group_ranks(group) for group in (groups.tp, groups.pp, groups.ep)]

    (tensor, pipeline, expert), _ = heard_in(777, 4096, act)
    assert tensor == [776, 777]
    assert pipeline == [777, 779]
    assert len(expert) == 8
    assert 777 in expert


def test_meta_collectives_have_shapes_and_are_told():
    def act():
        group = make_groups(Layout(tensor=4)).tp
        out = torch.empty(4, 8, 2, device="meta")
        dist.all_gather_into_tensor(out.flatten(0, 1), torch.empty(8, 2, device="meta"), group=group)
        part = torch.empty(4, dtype=torch.bfloat16, device="meta")
        dist.reduce_scatter_tensor(part, torch.empty(16, dtype=torch.bfloat16, device="meta"), group=group)
        given = torch.empty(5, device="meta")
        dist.all_to_all_single(torch.empty(8, device="meta"), given, [2] * 4, [2, 1, 1, 1], group=group)
        dist.all_reduce(given, group=group, async_op=True).wait()
        return group.rank()

    place, calls = heard_in(6, 8, act)
    ranks = (4, 5, 6, 7)
    assert place == 2
    assert calls == [
        Call("allgather_base", 64, ranks, is_host=False),
        Call("reduce_scatter_base", 32, ranks, is_host=False),
        Call("alltoall_base", 20, ranks, is_host=False),
        Call("allreduce", 20, ranks, is_host=False),
    ]


def test_others_send_the_same_unless_somebody_knows_better():
    def act():
        vectors = gather_vectors([1.0, 2.0])
        return vectors, sum_over(torch.tensor([3])), all_agree(True), gather_objects({"a": 1})

    (vectors, total, agreed, objects), _ = heard_in(1, 3, act)
    assert vectors.tolist() == [[1.0, 2.0]] * 3
    assert (total.tolist(), agreed, objects) == ([9], True, [{"a": 1}] * 3)

    def peers(tensor, ranks):
        return [tensor + rank for rank in ranks] if tensor.dtype == torch.float64 else None

    (vectors, *_), _ = heard_in(1, 3, act, peers=peers)
    assert vectors.tolist() == [[1.0, 2.0], [2.0, 3.0], [3.0, 4.0]]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_nothing_stays_behind(kind):
    before = torch.cuda.current_device, torch.Tensor.type, mappings._gather_along_first_dim
    state = torch.get_rng_state()

    def act():
        assert torch.cuda.current_device() == torch.device("meta")
        assert torch.empty(1, device="meta").type() == "torch.cuda.FloatTensor"
        return kind_of(torch.device("meta"))

    found, _ = heard_in(0, 2, act, kind)
    assert found == kind
    assert not dist.is_initialized()
    assert before == (torch.cuda.current_device, torch.Tensor.type, mappings._gather_along_first_dim)
    assert torch.equal(state, torch.get_rng_state())
    assert kind_of(torch.device("cpu")) == "cpu"
