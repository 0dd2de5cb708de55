"""Rank arithmetic against tables written by hand at 8, 16 and 64 ranks, and refusals with their remedy."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tide_megatron.base.errors import ConfigError
from tide_megatron.parallel.layout import Coordinates, DataShard, Layout, RankLists


def lists(text):
    """Read "0 1, 2 3" as ((0, 1), (2, 3)) and "0-3, 8" as ((0, 1, 2, 3), (8,))."""
    return tuple(tuple(n for part in group.split() for n in span(part)) for group in text.split(","))


def span(text):
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


EIGHT_ALONE = "0, 1, 2, 3, 4, 5, 6, 7"
TABLES = [
    # Data parallel only: the student.
    (8, Layout(), "replica", EIGHT_ALONE),
    (8, Layout(), "data", "0-7"),
    (8, Layout(), "stage", "0-7"),
    (8, Layout(), "expert", EIGHT_ALONE),
    (8, Layout(), "expert_data", "0-7"),
    (8, Layout(), "embedding", EIGHT_ALONE),
    # Experts over every rank.
    (8, Layout(expert=8), "expert", "0-7"),
    (8, Layout(expert=8), "expert_data", EIGHT_ALONE),
    (8, Layout(expert=4), "expert", "0-3, 4-7"),
    (8, Layout(expert=4), "expert_data", "0 4, 1 5, 2 6, 3 7"),
    (8, Layout(expert=4), "expert_replica", "0-3, 4-7"),
    # The two examples of design section 1.
    (8, Layout(tensor=2, pipeline=2), "replica", "0-3, 4-7"),
    (8, Layout(tensor=2, pipeline=2), "stage", "0 1 4 5, 2 3 6 7"),
    (8, Layout(tensor=2, pipeline=2), "tensor", "0 1, 2 3, 4 5, 6 7"),
    (8, Layout(tensor=2, pipeline=2), "pipeline", "0 2, 1 3, 4 6, 5 7"),
    (8, Layout(tensor=2, pipeline=2), "data", "0 4, 1 5, 2 6, 3 7"),
    (8, Layout(tensor=2, pipeline=2), "embedding", "0 2, 1 3, 4 6, 5 7"),
    (8, Layout(tensor=2, pipeline=2), "position_embedding", "0, 1, 4, 5"),
    (8, Layout(pipeline=2, expert=2), "expert", "0 2, 4 6, 1 3, 5 7"),
    (8, Layout(pipeline=2, expert=2), "expert_data", "0 4, 2 6, 1 5, 3 7"),
    (8, Layout(pipeline=2, expert=2), "expert_replica", "0-3, 4-7"),
    (8, Layout(tensor=2, pipeline=2, expert=2), "expert", "0 1, 4 5, 2 3, 6 7"),
    (8, Layout(tensor=2, pipeline=2, expert=2), "expert_data", "0 4, 1 5, 2 6, 3 7"),
    (8, Layout(tensor=2, pipeline=2, expert=4), "expert", "0 1 4 5, 2 3 6 7"),
    (8, Layout(tensor=2, pipeline=2, expert=4), "expert_replica", "0-7"),
    # Expert tensor parallelism: fastest inside a block.
    (8, Layout(expert=2, expert_tensor=2), "expert_tensor", "0 1, 2 3, 4 5, 6 7"),
    (8, Layout(expert=2, expert_tensor=2), "expert", "0 2, 1 3, 4 6, 5 7"),
    (8, Layout(expert=2, expert_tensor=2), "expert_block", "0-3, 4-7"),
    (8, Layout(expert=2, expert_tensor=2), "expert_data", "0 4, 1 5, 2 6, 3 7"),
    # Shapes that one factored grid cannot express.
    (16, Layout(tensor=4, expert=2), "tensor", "0-3, 4-7, 8-11, 12-15"),
    (16, Layout(tensor=4, expert=2), "expert", "0 1, 2 3, 4 5, 6 7, 8 9, 10 11, 12 13, 14 15"),
    (16, Layout(tensor=4, expert=2), "expert_data", "0 2 4 6 8 10 12 14, 1 3 5 7 9 11 13 15"),
    (16, Layout(tensor=2, expert_tensor=4), "expert_tensor", "0-3, 4-7, 8-11, 12-15"),
    (16, Layout(tensor=2, expert_tensor=4), "expert_data", "0 4 8 12, 1 5 9 13, 2 6 10 14, 3 7 11 15"),
    (16, Layout(pipeline=2, expert=4), "stage", "0 2 4 6 8 10 12 14, 1 3 5 7 9 11 13 15"),
    (16, Layout(pipeline=2, expert=4), "expert", "0 2 4 6, 8 10 12 14, 1 3 5 7, 9 11 13 15"),
    (16, Layout(pipeline=2, expert=4), "expert_data", "0 8, 2 10, 4 12, 6 14, 1 9, 3 11, 5 13, 7 15"),
    (16, Layout(pipeline=2, expert=4), "expert_replica", "0-7, 8-15"),
    (16, Layout(tensor=2, pipeline=4), "replica", "0-7, 8-15"),
    (16, Layout(tensor=2, pipeline=4), "pipeline", "0 2 4 6, 1 3 5 7, 8 10 12 14, 9 11 13 15"),
    (16, Layout(tensor=2, pipeline=4), "embedding", "0 6, 1 7, 8 14, 9 15"),
    (12, Layout(tensor=2, expert=3), "expert", "0-2, 3-5, 6-8, 9-11"),
    # Four ranks of tensor x two stages; experts inside each replica's stage.
    (64, Layout(tensor=4, pipeline=2, expert=4), "stage",
     "0-3 8-11 16-19 24-27 32-35 40-43 48-51 56-59, 4-7 12-15 20-23 28-31 36-39 44-47 52-55 60-63"),
    (64, Layout(tensor=4, pipeline=2, expert=4), "expert",
     "0-3, 8-11, 16-19, 24-27, 32-35, 40-43, 48-51, 56-59,"
     "4-7, 12-15, 20-23, 28-31, 36-39, 44-47, 52-55, 60-63"),
    # Experts across replicas, each cut in two: stage 1 is 2 3, 10 11, 18 19, ...
    (64, Layout(tensor=2, pipeline=4, expert=8, expert_tensor=2), "expert",
     "0 8 16 24 32 40 48 56, 1 9 17 25 33 41 49 57, 2 10 18 26 34 42 50 58, 3 11 19 27 35 43 51 59,"
     "4 12 20 28 36 44 52 60, 5 13 21 29 37 45 53 61, 6 14 22 30 38 46 54 62, 7 15 23 31 39 47 55 63"),
    (64, Layout(tensor=2, pipeline=4, expert=4, expert_tensor=2), "expert_block",
     "0 1 8 9 16 17 24 25, 32 33 40 41 48 49 56 57, 2 3 10 11 18 19 26 27, 34 35 42 43 50 51 58 59,"
     "4 5 12 13 20 21 28 29, 36 37 44 45 52 53 60 61, 6 7 14 15 22 23 30 31, 38 39 46 47 54 55 62 63"),
    (64, Layout(tensor=2, pipeline=4, expert=4, expert_tensor=2), "expert_replica", "0-31, 32-63"),
    (8, Layout(tensor=2), "alone", EIGHT_ALONE),
    (8, Layout(tensor=2), "world", "0-7"),
    (16, Layout(tensor=2, pipeline=4), "data", "0 8, 1 9, 2 10, 3 11, 4 12, 5 13, 6 14, 7 15"),
    (16, Layout(tensor=2, pipeline=4), "position_embedding", "0, 1, 8, 9"),
    (16, Layout(pipeline=2, expert=2, expert_tensor=2), "expert_block",
     "0 2 4 6, 8 10 12 14, 1 3 5 7, 9 11 13 15"),
    (16, Layout(pipeline=2, expert=2, expert_tensor=2), "expert_tensor",
     "0 2, 4 6, 8 10, 12 14, 1 3, 5 7, 9 11, 13 15"),
    (16, Layout(tensor=2), "alone", "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15"),
    (16, Layout(tensor=2), "world", "0-15"),
    (64, Layout(tensor=4, pipeline=2), "tensor",
     "0-3, 4-7, 8-11, 12-15, 16-19, 20-23, 24-27, 28-31, 32-35, 36-39, 40-43, 44-47,"
     "48-51, 52-55, 56-59, 60-63"),
    (64, Layout(tensor=4, pipeline=2), "pipeline",
     "0 4, 1 5, 2 6, 3 7, 8 12, 9 13, 10 14, 11 15, 16 20, 17 21, 18 22, 19 23, 24 28, 25 29, 26 30, 27 31,"
     "32 36, 33 37, 34 38, 35 39, 40 44, 41 45, 42 46, 43 47, 48 52, 49 53, 50 54, 51 55,"
     "56 60, 57 61, 58 62,"
     "59 63"),
    (64, Layout(tensor=2, pipeline=4), "embedding",
     "0 6, 1 7, 8 14, 9 15, 16 22, 17 23, 24 30, 25 31, 32 38, 33 39, 40 46, 41 47, 48 54,"
     "49 55, 56 62, 57 63"),
    (64, Layout(tensor=2, pipeline=4), "position_embedding",
     "0, 1, 8, 9, 16, 17, 24, 25, 32, 33, 40, 41, 48, 49, 56, 57"),
    (64, Layout(tensor=4, pipeline=2), "data",
     "0 8 16 24 32 40 48 56, 1 9 17 25 33 41 49 57, 2 10 18 26 34 42 50 58, 3 11 19 27 35 43 51 59,"
     "4 12 20 28 36 44 52 60, 5 13 21 29 37 45 53 61, 6 14 22 30 38 46 54 62, 7 15 23 31 39 47 55 63"),
    (64, Layout(tensor=4, pipeline=2), "replica", "0-7, 8-15, 16-23, 24-31, 32-39, 40-47, 48-55, 56-63"),
    (64, Layout(tensor=2, pipeline=4, expert=4, expert_tensor=2), "expert_tensor",
     "0 1, 8 9, 16 17, 24 25, 32 33, 40 41, 48 49, 56 57, 2 3, 10 11, 18 19, 26 27, 34 35,"
     "42 43, 50 51, 58 59,"
     "4 5, 12 13, 20 21, 28 29, 36 37, 44 45, 52 53, 60 61, 6 7, 14 15, 22 23, 30 31,"
     "38 39, 46 47, 54 55, 62 63"),
    (64, Layout(tensor=2, pipeline=4, expert=4, expert_tensor=2), "expert_data",
     "0 32, 1 33, 8 40, 9 41, 16 48, 17 49, 24 56, 25 57, 2 34, 3 35, 10 42, 11 43, 18 50,"
     "19 51, 26 58, 27 59,"
     "4 36, 5 37, 12 44, 13 45, 20 52, 21 53, 28 60, 29 61, 6 38, 7 39, 14 46, 15 47,"
     "22 54, 23 55, 30 62, 31 63"),
    (64, Layout(tensor=64), "alone", ", ".join(str(rank) for rank in range(64))),
    (64, Layout(tensor=64), "world", "0-63"),
]  # fmt: skip


@pytest.mark.parametrize(("world", "layout", "field", "table"), TABLES)
def test_groups_equal_the_table(world, layout, field, table):
    assert getattr(layout.rank_lists(world), field) == lists(table)


@pytest.mark.parametrize("world", [8, 16, 64])
def test_every_group_has_a_table(world):
    assert {field for size, _, field, _ in TABLES if size == world} == {
        field.name for field in dataclasses.fields(RankLists)
    }


@pytest.mark.parametrize(
    ("pipeline", "layers", "expected"),
    [
        (1, 3, (3,)),
        (2, 4, (2, 2)),
        (2, 3, (2, 1)),
        (2, 2, (1, 1)),
        (3, 3, (1, 1, 1)),
        (3, 5, (2, 2, 1)),
        (3, 20, (7, 7, 6)),
        (4, 6, (1, 2, 2, 1)),
        (4, 7, (2, 2, 2, 1)),
        (4, 20, (5, 5, 5, 5)),
        # Two layers in each middle stage leave 8 for the ends, three leave 2.
        (8, 20, (1, 3, 3, 3, 3, 3, 3, 1)),
        (8, 9, (2, 1, 1, 1, 1, 1, 1, 1)),
        (8, 28, (2, 4, 4, 4, 4, 4, 4, 2)),
    ],
)
def test_stages_by_hand(pipeline, layers, expected):
    assert Layout(pipeline=pipeline).stage_layers(layers) == expected


@given(st.integers(1, 12), st.integers(0, 60))
def test_no_split_that_can_be_expressed_has_a_shorter_longest_stage(pipeline, more):
    layers = pipeline + more
    stages = Layout(pipeline=pipeline).stage_layers(layers)
    assert len(stages) == pipeline
    assert sum(stages) == layers
    assert min(stages) >= 1
    assert len(set(stages[1:-1])) <= 1
    if pipeline > 2:
        longest = [
            max(middle, -(-(layers - (pipeline - 2) * middle) // 2))
            for middle in range(1, layers)
            if layers - (pipeline - 2) * middle >= 2
        ]
        assert max(stages) == min(longest)


@st.composite
def legal_layouts(draw):
    tensor, pipeline, expert, slices, more = (draw(st.integers(1, 4)) for _ in range(5))
    # A stage must hold whole expert blocks: make the data axis a multiple of the block.
    world = tensor * pipeline * expert * slices * more
    return world, Layout(tensor=tensor, pipeline=pipeline, expert=expert, expert_tensor=slices)


@given(legal_layouts())
def test_every_axis_covers_the_world_once(case):
    world, layout = case
    layout.check(world)
    sizes = {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "data": layout.num_replicas(world),
        "replica": layout.tensor * layout.pipeline,
        "stage": layout.tensor * layout.num_replicas(world),
        "expert": layout.expert,
        "expert_tensor": layout.expert_tensor,
        "expert_block": layout.expert * layout.expert_tensor,
        "expert_data": world // (layout.pipeline * layout.expert * layout.expert_tensor),
        "expert_replica": layout.expert * layout.expert_tensor * layout.pipeline,
        "alone": 1,
        "world": world,
    }
    groups = layout.rank_lists(world)
    for field, size in sizes.items():
        found = getattr(groups, field)
        assert sorted(rank for ranks in found for rank in ranks) == list(range(world)), field
        assert {len(ranks) for ranks in found} == {size}, field
        assert all(list(ranks) == sorted(ranks) for ranks in found), field


@given(legal_layouts())
def test_seats_invert_ranks(case):
    world, layout = case
    for rank in range(world):
        seat = layout.coordinates(rank)
        assert layout.rank(tensor=seat.tensor, pipeline=seat.pipeline, data=seat.data) == rank
        assert layout.replicas(world)[seat.data][seat.index] == rank


def test_the_ranks_of_a_replica_read_the_same_part_of_the_data():
    shards = [Layout(tensor=2).data_shard(rank, 6) for rank in range(6)]
    assert shards == [DataShard(rank=part, size=3) for part in (0, 0, 1, 1, 2, 2)]
    assert Layout().data_shard(1, 2) == DataShard(rank=1, size=2)


def test_a_seat_by_hand():
    assert Layout(tensor=2, pipeline=4).coordinates(13) == Coordinates(tensor=1, pipeline=2, data=1, index=5)
    assert Layout(tensor=2, pipeline=4).rank() == 0


@pytest.mark.parametrize(
    ("layout", "world", "shape", "reason", "nearest"),
    [
        (Layout(tensor=3), 4, {}, "a replica takes tensor x pipeline = 3 ranks, which does", "{tensor=4}"),
        (Layout(tensor=8), 4, {}, "= 8 ranks, which does not divide the 4 ranks", "{tensor=4}"),
        (Layout(tensor=4), 4, {"heads": 6}, "6 attention heads cannot be shared evenly", "{tensor=2}"),
        (Layout(tensor=4), 4, {"heads": 8, "groups": 2}, "2 key-value heads cannot", "{tensor=2}"),
        (Layout(pipeline=4), 8, {"layers": 3}, "3 layers are too few for pipeline=4", "{pipeline=2}"),
        (Layout(pipeline=8), 8, {"layers": 7}, "7 layers are too few for pipeline=8", "{pipeline=4}"),
        (Layout(expert=8), 8, {"experts": 4}, "4 experts cannot be shared evenly by", "{expert=4}"),
        (Layout(expert=4), 4, {"experts": 0}, "the model has no experts", "{tensor=1} (data-parallel only)"),
        (Layout(expert_tensor=2), 4, {"experts": 0}, "expert_tensor=2 but the model has no", "{tensor=1}"),
        (Layout(pipeline=2, expert=4), 4, {}, "= 4 ranks of one pipeline stage, which does", "{expert=4}"),
        (Layout(pipeline=2, expert=4), 4, {"experts": 2}, "2 experts cannot", "{pipeline=2, expert=2}"),
        (Layout(expert=2, expert_tensor=4), 4, {}, "does not divide the 4 ranks it has", "{expert_tensor=4}"),
        # Two halvings of one axis rather than one of each: the other axis stays as wanted.
        (Layout(expert=2, expert_tensor=8), 4, {}, "= 16 ranks of one", "{expert=2, expert_tensor=2}"),
        (Layout(tensor=0), 4, {}, "tensor=0 must be a whole number, at least 1", "{tensor=1}"),
        (Layout(expert=-2), 4, {}, "expert=-2 must be a whole number", "{tensor=1}"),
    ],
)  # fmt: skip
def test_illegal_layouts_are_refused_with_the_nearest_legal_one(layout, world, shape, reason, nearest):
    with pytest.raises(ConfigError) as caught:
        layout.check(world, **shape)
    message = str(caught.value)
    assert message.startswith(f"layout {layout}: ")
    assert reason in message
    assert f"the nearest legal layout is {nearest}" in message


def test_legal_layouts_pass():
    Layout(tensor=2, pipeline=2, expert=4).check(8, heads=16, groups=4, experts=256, layers=20)
    Layout(tensor=2, expert=3).check(12, heads=4, groups=2, experts=6, layers=5)
    Layout().check(7, heads=5, groups=5, experts=0, layers=3)


@given(legal_layouts(), st.integers(1, 24), st.integers(1, 24), st.integers(0, 24), st.integers(1, 24))
def test_what_is_offered_instead_is_legal(case, heads, groups, experts, layers):
    world, layout = case
    shape = {"heads": heads, "groups": groups, "experts": experts, "layers": layers}
    try:
        layout.check(world, **shape)
    except ConfigError as error:
        offer = str(error).rpartition("nearest legal layout is {")[2].partition("}")[0]
        axes = dict(pair.split("=") for pair in offer.split(", "))
        other = dataclasses.replace(Layout(), **{axis: int(size) for axis, size in axes.items()})
        assert other != layout
        other.check(world, **shape)
