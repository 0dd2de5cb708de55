"""Process groups on four ranks equal the rank arithmetic, and are shared between layouts by their ranks."""

import tide_megatron.platform

import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from bench.groups import LIMIT_SECONDS, measure, pair_layouts
from tide_megatron.parallel import groups as module
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout
from tide_megatron.parallel.vocab_group import make_across, make_vocab_group

# Megatron's field -> ours.
FIELDS = {
    "tp": "tensor", "pp": "pipeline", "dp": "data", "mp": "replica", "cp": "alone", "tp_cp": "tensor",
    "dp_cp": "data", "tp_dp_cp": "stage", "ep": "expert", "expt_tp": "expert_tensor", "tp_ep": "expert_block",
    "expt_dp": "expert_data", "tp_ep_pp": "expert_replica", "embd": "embedding",
    "pos_embd": "position_embedding", "intra_dp_cp": "data", "intra_expt_dp": "expert_data",
    "intra_dist_opt": "world",
}  # fmt: skip
UNUSED = {"hcp", "inter_dist_opt"}
LAYOUTS = [
    Layout(),
    Layout(expert=4),
    Layout(expert=2),
    Layout(tensor=2, expert=2),
    Layout(tensor=2, pipeline=2),
    Layout(pipeline=2, expert=2),
    Layout(pipeline=4),
    Layout(expert=2, expert_tensor=2),
]


def groups_of_each(layouts):
    """Return, for each layout and field, this rank's group as global ranks."""
    found = []
    for layout in layouts:
        groups = make_groups(layout)
        fields = {name: getattr(groups, name) for name in FIELDS}
        found.append({n: g and tuple(dist.get_process_group_ranks(g)) for n, g in fields.items()})
        assert all(vars(groups)[name] is None for name in UNUSED), "an unused field must be set to None"
    return found


def test_every_field_holds_the_ranks_of_the_arithmetic(pool):
    for rank, found in enumerate(pool(4).run(groups_of_each, LAYOUTS)):
        for layout, fields in zip(LAYOUTS, found, strict=True):
            lists = layout.rank_lists(4)
            for name, ours in FIELDS.items():
                mine = [ranks for ranks in getattr(lists, ours) if rank in ranks]
                assert fields[name] == (mine[0] if mine else None), (rank, layout, name)


def fields_left_unset():
    groups = make_groups(Layout())
    declared = set(ProcessGroupCollection.__dataclass_fields__)
    return {name for name in declared if name not in vars(groups)}


def test_only_later_optional_fields_are_left_unset(pool):
    # Newer releases declare more; those are optional there (None when unset) and no path of ours reads them.
    [unset] = pool(1).run(fields_left_unset)
    allowed = {"gtp_remat", "expt_gtp_remat", "dp_cp_gtp_remat", "expt_dp_gtp_remat"}
    allowed |= {"tp_ep_pp_with_egtp_remat", "dp_cp_ag", "expt_dp_ag"}
    assert unset <= allowed


def sums_and_sharing():
    first, again = make_groups(Layout(tensor=2)), make_groups(Layout(tensor=2))
    other = make_groups(Layout(expert=2))
    mine = torch.tensor(2.0 ** dist.get_rank())
    sums = []
    for group in (first.tp, first.dp, other.expt_dp, first.intra_dist_opt):
        total = mine.clone()
        dist.all_reduce(total, group=group)
        sums.append(int(total))
    same_world = first.intra_dist_opt is dist.group.WORLD
    return sums, again.tp is first.tp and other.ep is first.tp and other.expt_dp is first.dp and same_world


def test_groups_are_cached_by_their_ranks_and_work(pool):
    # Pairs 01, 23 then 02, 13 of the powers of two; the other layout meets the same pairs and shares them.
    sums, shared = zip(*pool(4).run(sums_and_sharing), strict=True)
    assert list(sums) == [[3, 5, 5, 15], [3, 10, 10, 15], [12, 5, 5, 15], [12, 10, 10, 15]]
    assert all(shared)


def groups_with_host_values():
    """Make groups in the order of a run; return which ranks' groups were asked to carry host values."""
    stock, asked = module.new_group, []

    def new_group(ranks, *, for_host_values):
        asked.append((tuple(ranks), for_host_values))
        return stock(ranks, for_host_values=for_host_values)

    before = dict(
        module._CACHE
    )  # every group of gloo's keeps a thread awake, so what is made here goes again
    module.new_group = new_group
    module._CACHE.clear()
    try:
        head = make_vocab_group([100], 2)
        layout = Layout(tensor=2)
        shared = make_groups(layout).tp is head.group
        make_across(Layout(), 4)
        whole = make_vocab_group([100], 4).group is dist.group.WORLD
    finally:
        module.new_group = stock
        for group in filter(None, module._CACHE[dist.group.WORLD].values()):
            dist.destroy_process_group(group)
        module._CACHE.clear()
        module._CACHE.update(before)
    return asked, shared, whole


def test_only_vocabulary_groups_carry_host_values_and_models_share_them(pool):
    for asked, shared, whole in pool(4).run(groups_with_host_values):
        assert [ranks for ranks, carries in asked if carries] == [(0, 1), (2, 3)]
        assert {ranks for ranks, carries in asked if not carries} >= {(0, 2), (1, 3), (0,)}
        assert len({ranks for ranks, _ in asked}) == len(asked), "each is made once"
        assert shared
        assert whole


def make_for_wrong_world():
    with pytest.raises(AssertionError, match="groups for 8 ranks in a world of 2"):
        make_groups(Layout(), 8)
    return True


def test_a_wrong_world_is_a_bug(pool):
    assert pool(2).run(make_for_wrong_world) == [True, True]


def test_eight_ranks_that_were_just_forked_soon_have_all_groups_of_the_papers_pair():
    found = measure(pair_layouts(), 8)
    # The world, this rank alone, and WeDLM's replica, tensor, pipeline, data and stage.
    assert found["groups_of_a_rank"] == 7
    assert found["made"] < LIMIT_SECONDS, found  # 0.7 s on two cores at load 17: only waiting takes so long
