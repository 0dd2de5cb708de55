"""What is said of ranks that differ: who, both values, what to do; over ranks that were never started."""

import dataclasses
import re

import pytest

from tide_megatron.parallel.layout import Layout
from tide_megatron.parallel.link_speed import MEASURES, ClockOffset, GroupKind, GroupTimes, group_kinds
from tide_megatron.train.preflight import refuse
from tide_megatron.train.preflight_report import Comparison, Preflight, as_json, told
from tide_megatron.train.rank_differences import (
    HeldPart,
    clock_lines,
    content_differences,
    disk_lines,
    named,
    noted,
    recipe_difference,
    shard_differences,
    slow_lines,
    version_differences,
)
from tide_megatron.train.rank_facts import RankFacts

GB = 10**9
NO_FILES = [{}] * 8


def facts_of(rank, **changes):
    """Return the facts of a rank of hosts of two ranks each, a to h."""
    host = "abcdefgh"[rank // 2]
    facts = RankFacts(
        host=host,
        machine=f"boot {host}",
        device="H100 (sm_90)",
        versions={"Python": "3.11.7", "numpy": "2.0", "torch": "2.13", "megatron-core": "0.16.1"},
        recipe="r",
        free_bytes=100 * GB,
        copies={"code": f"boot {host} 1:1", "data.train": f"boot {host} 1:2"},
    )
    return dataclasses.replace(facts, **changes)


@pytest.fixture
def facts():
    return [facts_of(rank) for rank in range(8)]


def test_ranks_that_are_alike_are_let_pass(facts):
    same = [{"code": "c", "data.train": "d"}] * 8
    held = [{"student": HeldPart(part="whole", digest="w", head="None", head_digest="h")}] * 8
    lines = [
        *version_differences(facts),
        *content_differences(facts, same, NO_FILES),
        *shard_differences(facts, held),
        *noted(facts),
        *disk_lines("run", facts, 50 * GB),
    ]
    assert lines == [[], []]
    refuse([])


def test_the_odd_ranks_are_named_with_both_values_and_the_remedy(facts):
    found = [{"code": "new" if rank in (2, 3, 7) else "old", "data.train": "d"} for rank in range(8)]
    (line,) = content_differences(facts, found, NO_FILES)
    assert line.startswith(
        "code: differs between ranks: ranks 2-3, 7 (hosts b, d): new; ranks 0-1, 4-6 (hosts a, c, d): old. "
    )
    assert "tide submit" in line


def test_of_as_many_ranks_on_each_side_those_of_rank_0_are_taken_for_right(facts):
    found = [{"data.train": str(rank // 4)} for rank in range(8)]
    (line,) = content_differences(facts, found, NO_FILES)
    assert "data.train: differs between ranks: ranks 4-7 (hosts c, d): 1; ranks 0-3 (hosts a, b): 0." in line


def test_the_files_that_differ_are_named_first(facts):
    found = [{"code": str(rank % 4 == 0)} for rank in range(8)]
    files = [
        {"code": {"a.py": "1", "b.py": str(rank % 4 == 0), **({} if rank % 4 else {"new.py": "1"})}}
        for rank in range(8)
    ]
    files[3] = {}  # it could not read its own
    (line,) = content_differences(facts, found, files)
    assert line.startswith("code (b.py, new.py): differs between ranks: ranks 0, 4 (hosts a, c): True; ranks")


def test_what_some_cannot_read_differs_and_what_nobody_can_is_told_by_others(facts):
    found = [{"data.train": "cannot be read (gone)" if rank > 3 else "d"} for rank in range(8)]
    (line,) = content_differences(facts, found, NO_FILES)
    assert "ranks 4-7 (hosts c, d): cannot be read (gone); ranks 0-3 (hosts a, b): d. copy the folder" in line
    assert list(content_differences(facts, [{"data.train": "cannot be read (gone)"}] * 8, NO_FILES)) == []


def test_versions_that_compute_are_refused_and_others_noted(facts):
    others = facts[5].versions | {"torch": "2.5", "Python": "3.11.9"}
    facts[5] = dataclasses.replace(facts[5], versions=others, device="A100 (sm_80)")
    (line,) = version_differences(facts)
    assert line.startswith("torch: differs between ranks: rank 5 (host c): 2.5; ranks 0-4, 6-7 ")
    assert [line.partition(":")[0] for line in noted(facts)] == ["Python", "device"]


def test_every_key_of_another_recipe_is_named(facts):
    usual = {"steps": 4, "optimizer": {"learning_rate": 1e-4, "betas": [0.9, 0.95]}, "--resume": True}
    trees = [usual] * 7 + [{**usual, "optimizer": usual["optimizer"] | {"learning_rate": 2e-4}, "steps": 5}]
    facts[7] = dataclasses.replace(facts[7], recipe="other")
    line = recipe_difference(facts, trees)
    assert "rank 7 (host d), unlike ranks 0-6 (hosts a, b, c and 1 more): " in line
    assert "optimizer.learning_rate: 0.0001 -> 0.0002; steps: 4 -> 5" in line
    assert line.endswith("start every rank with the same run file and overrides")


def test_equal_parts_with_other_weights_are_refused_the_head_by_its_own_cut(facts):
    def held(rank, digest="w", head_digest="h"):
        part, head = f"experts {rank % 2}", f"ids {rank % 4}"
        return {"teachers.moe": HeldPart(part=part, digest=digest + part, head=head, head_digest=head_digest)}

    assert list(shard_differences(facts, [held(rank) for rank in range(8)])) == []
    (line,) = shard_differences(facts, [held(rank, digest="x" if rank == 6 else "w") for rank in range(8)])
    assert line.startswith(
        "teachers.moe.folder: weights in memory: differs between ranks: rank 6 (host d): x"
    )
    assert "; ranks 0, 2, 4 (hosts a, b, c): w" in line
    (line,) = shard_differences(
        facts, [held(rank, head_digest="x" if rank == 6 else "h") for rank in range(8)]
    )
    assert "the head in memory: differs between ranks: rank 2 (host b): h; rank 6 (host d): x" in line or (
        "the head in memory: differs between ranks: rank 6 (host d): x; rank 2 (host b): h" in line
    )


@pytest.mark.parametrize(
    ("free", "fault", "warning"),
    [
        (100 * GB, "", ""),
        (99 * GB, "", "the next one is written before"),
        (49 * GB, "make room, or choose", ""),
    ],
)
def test_a_disk_without_room_for_one_checkpoint_is_refused_for_two_warned_of(facts, free, fault, warning):
    facts[3] = dataclasses.replace(facts[3], free_bytes=free)
    facts[4] = dataclasses.replace(facts[4], free_bytes=None)
    faults, warnings = disk_lines("runs/x", facts, 50 * GB)
    for lines, words in ((faults, fault), (warnings, warning)):
        assert len(lines) == bool(words)
        assert all(
            line.startswith("folder: runs/x: ranks 2-3 (host b): ") and words in line for line in lines
        )
    assert disk_lines("runs/x", facts, None) == ([], [])


def test_a_clock_is_complained_of_only_beyond_what_the_round_trip_explains(facts):
    clocks = {
        2: ClockOffset(seconds=2.5, within=0.001),
        4: ClockOffset(seconds=2.5, within=0.6),
        6: ClockOffset(seconds=-9.0, within=0.1),
    }
    first, second = clock_lines(facts, clocks, 2.0)
    assert first.startswith("clock: rank 2 (host b) is 2.5 s ahead of rank 0 (host a)")
    assert second.startswith("clock: rank 6 (host d) is 9.0 s behind rank 0 (host a)")


def times_of(exchange, reduce=(1.0, 1.0, 1.0, 1.0)):
    kind = GroupKind(names=("moe tensor",), lists=((0, 1), (2, 3), (4, 5), (6, 7)))
    seconds = dict.fromkeys(MEASURES, (1.0, 1.0, 1.0, 1.0)) | {"exchange": exchange, "reduce": reduce}
    return GroupTimes(kind=kind, seconds=seconds, bytes=1000)


def test_a_slow_group_and_a_slow_link_are_named(facts):
    assert list(slow_lines(facts, [times_of((1.0, 1.0, 1.0, 3.9))], [1.0] * 8, 4.0)) == []
    lines = list(slow_lines(facts, [times_of((1.0, 1.0, 5.0, 1.0))], [1, 1, 1, 8, 8, 1, 1, 1], 4.0))
    assert lines[0].startswith("links: ranks 4-5 (host c) (moe tensor) take 5.0 times as long")
    assert lines[1].startswith("links: ranks 3-4 (hosts b, c) give and take up to 8.0 times as slowly")
    assert (
        times_of((1.0,) * 4, reduce=(2.0,) * 4).rate("reduce", 0) == 500
    )  # each of two sends the whole once
    assert times_of((2.0,) * 4).rate("exchange", 0) == 250


def test_kinds_of_groups_stand_once_and_leave_out_ranks_alone():
    kinds = group_kinds(Layout(), {"moe": Layout(expert=4), "dense": Layout(tensor=2, pipeline=2)}, 4, 8)
    named_ = {name: kind.lists for kind in kinds for name in kind.names}
    assert named_["all ranks"] == named_["student data"] == (tuple(range(8)),)
    assert named_["vocabulary"] == named_["moe experts"] == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert named_["dense tensor"] == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert named_["dense pipeline"] == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert not {"dense experts", "moe tensor", "dense rows"} & set(named_)
    assert len({kind.lists for kind in kinds}) == len(kinds)
    assert group_kinds(Layout(), {"moe": Layout()}, 1, 1) == []


def test_many_faults_are_one_message_and_many_ranks_short(facts):
    with pytest.raises(Exception, match=r"^2 faults before the first step:\n- x: a\n- y: b$"):
        refuse(["x: a", "y: b"])
    many = [facts_of(0, host=f"n{rank:03}") for rank in range(1000)]
    told_ = named(range(0, 1000, 2), many)
    assert told_ == "ranks 0, 2, 4, 6, 8, 10, 12, 14, ... (hosts n000, n002, n004 and 497 more)"


def test_the_tables_and_the_file_say_the_same(facts):
    comparison = Comparison(
        facts=facts,
        contents={"code": "c0de", "data.train": "da7a"},
        checkpoint_bytes=50 * GB,
        clocks={rank: ClockOffset(seconds=rank / 10, within=0.001) for rank in (2, 4, 6)},
        warnings=["w"],
        seconds=0.5,
    )
    found = Preflight(
        comparison=comparison,
        shards={"student": [("whole", range(8))], "teachers.moe": [("a", [0, 1, 2]), ("b", [3])]},
        groups=[times_of((1.0,) * 4)],
        neighbours=[1.0] * 7 + [2.0],
        warnings=["w", "v"],
        seconds=1.25,
    )
    lines = [re.sub(" +", " ", line).strip() for line in told(found).splitlines()]
    assert "code c0de" in lines
    assert "teachers.moe in memory 2 part(s), 1 to 3 equal rank(s) each" in lines
    assert "b 2-3 H100 (sm_90) 100 GB +0.2000 s (within 1 ms) 1 kB/s" in lines
    assert "d 6-7 H100 (sm_90) 100 GB +0.6000 s (within 1 ms) 500 B/s" in lines
    assert "moe tensor 4 of 2 1e+03 ms 1 kB/s 1e+03 ms 500 B/s" in lines
    assert lines[-1] == "preflight: 1.25 s, 2 warnings"
    written = as_json(found)
    assert written["hosts"][1] == {
        "host": "b",
        "ranks": [2, 3],
        "device": "H100 (sm_90)",
        "free_bytes": 100 * GB,
        "clock": {"ahead": 0.2, "within": 0.001},
    }
    assert written["groups"][0]["seconds"]["exchange"] == [1.0] * 4
    assert written["contents"]["code"] == "c0de"
