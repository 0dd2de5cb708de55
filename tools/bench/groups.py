"""How long the process groups of the paper's pair take, from the first rank's first init to the last group.

    python tools/bench/groups.py --ranks 8 32 --json

Ranks are real: gloo, started by our launcher, forks of a server that has imported everything. They join the
world and make the groups of `configs/runs/paper_pair.yaml` in a run's order: vocabulary group, student,
LLaDA2 spread over 8 expert ranks, WeDLM as TP2xPP2 (which needs the most groups). Then every rank uses each
of its groups once, so that one that only seems to be there would not count. All ranks share the clock.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs as a command

from bench.cost import machine
from bench.shapes import FOLDERS
from tide_megatron.base.device import Device
from tide_megatron.base.startup import STARTUP
from tide_megatron.base.stop import StopFlag
from tide_megatron.launch.ranks import run_ranks
from tide_megatron.parallel.collectives import gather_objects
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout
from tide_megatron.parallel.vocab_group import make_across, make_vocab_group, vocab_group_size
from tide_megatron.train.resolve import load_recipe

PAIR = Path(__file__).resolve().parents[2] / "configs/runs/paper_pair.yaml"
CUT = ("teachers.wedlm.layout.tensor=2", "teachers.wedlm.layout.pipeline=2")
LIMIT_SECONDS = 30.0
"""What 32 ranks may take."""


def pair_layouts() -> dict[str, Layout]:
    """Return the layouts of the paper's pair, WeDLM cut, the student first."""
    recipe, _ = load_recipe(PAIR, ["epochs=null", "steps=1", *CUT])
    models = {"student": recipe.student, **recipe.teachers}
    return {name: model.layout for name, model in models.items()}


def make_pair(layouts: dict[str, Layout]) -> set[dist.ProcessGroup]:
    """Make all groups of a run with these layouts; return those this rank is in. All ranks call it."""
    size = vocab_group_size(layouts.values(), dist.get_world_size())
    made: list[Any] = [make_vocab_group([model["vocab_size"] for model in FOLDERS.values()], size).group]
    for name, layout in layouts.items():
        made += vars(make_groups(layout)).values()
        made += [make_across(layout, size)] if name != "student" else []
    return {group for group in made if isinstance(group, dist.ProcessGroup)}


def join_and_make(layouts: dict[str, Layout], *, device: Device, stop: StopFlag) -> list[dict[str, Any]]:
    """Make the groups on this rank, and use them; return when each part ended, of every rank."""
    joined = time.monotonic()
    began = joined - STARTUP.seconds()["world"]
    groups = make_pair(layouts)
    made = time.monotonic()
    sums = {}
    for group in sorted(groups, key=lambda group: group.group_name):
        total = torch.tensor(float(dist.get_rank()))
        dist.all_reduce(total, group=group)
        sums[tuple(dist.get_process_group_ranks(group))] = int(total)
    wrong = [ranks for ranks, total in sums.items() if total != sum(ranks)]
    return gather_objects(
        {"began": began, "joined": joined, "made": made, "used": time.monotonic(), "wrong": wrong}
        | {"groups": len(groups)}
    )


def measure(layouts: dict[str, Layout], ranks: int) -> dict[str, Any]:
    """Start ranks; return the seconds from the first init on."""
    each = run_ranks(join_and_make, (layouts,), ranks, "cpu")
    began = min(rank["began"] for rank in each)
    ends = {name: max(rank[name] for rank in each) - began for name in ("joined", "made", "used")}
    assert not any(rank["wrong"] for rank in each), "a group has other ranks than it says"
    return {"ranks": ranks, "groups_of_a_rank": max(rank["groups"] for rank in each), **ends}


def main() -> None:
    """Parse, measure, print; end with 1 where 32 ranks or fewer took longer than they may."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    layouts, found = pair_layouts(), []
    for ranks in given.ranks:
        found.append(measure(layouts, ranks))
        words = ", ".join(f"{name} {found[-1][name]:.2f} s" for name in ("joined", "made", "used"))
        print(
            f"{ranks} ranks, up to {found[-1]['groups_of_a_rank']} groups each, after the first init: {words}"
        )
    if given.json:
        print(json.dumps({"limit_seconds": LIMIT_SECONDS, "worlds": found, **machine()}))
    sys.exit(any(one["made"] > LIMIT_SECONDS for one in found if one["ranks"] <= 32))


if __name__ == "__main__":
    main()
