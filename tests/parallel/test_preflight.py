"""Ranks that differ are refused before the first step, on all with one message; real groups are measured.

Each rank of the pool reads its own recipe, as the ranks of several nodes do, so that one of them may be given
another copy of a folder, another release of the code, another option.
"""

import contextlib
import functools
import json
import os
import re
import shutil
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from tests.tiny_run import PAIR_ON_FOUR, write_pair_run
from tide_megatron import api
from tide_megatron.base.device import Device
from tide_megatron.base.errors import ConfigError, TideError
from tide_megatron.base.files import digest_of
from tide_megatron.base.stop import StopFlag
from tide_megatron.parallel.collectives import gather_objects, held_by_first
from tide_megatron.parallel.link_speed import clock_offsets
from tide_megatron.train import preflight, rank_facts
from tide_megatron.train.folder import held_folder
from tide_megatron.train.preflight_report import as_json
from tide_megatron.train.resolve import load_recipe
from tide_megatron.train.setup import set_up

CPU = Device(type="cpu", index=0, backend="gloo", threads=1)
ODD = 2
AHEAD_SECONDS = 100.0  # a lease of another host looks dead by such a clock


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Write a whole run with three teachers; return its recipe's file."""
    return write_pair_run(tmp_path_factory.mktemp("preflight"))


@contextlib.contextmanager
def planted(what, place):
    """Make this rank one of another installation: of other code, versions, disk, machine, clock or folder."""
    with contextlib.ExitStack() as stack:
        if what == "code":
            other = rank_facts.folders
            stack.enter_context(
                patch.object(rank_facts, "folders", lambda recipe: other(recipe) | {"code": Path(place)})
            )
        elif what == "versions":
            stock = rank_facts.versions
            stack.enter_context(
                patch.object(rank_facts, "versions", lambda device: stock(device) | {"torch": "2.5.0"})
            )
        elif what == "disk":
            stack.enter_context(patch.object(rank_facts, "free_bytes", lambda folder: 100_000))
        elif what == "machine":
            here = rank_facts.Holder.here
            other_host = staticmethod(lambda job: here_of(here(job)))
            stack.enter_context(patch.object(rank_facts.Holder, "here", other_host))
            now = time.time
            stack.enter_context(patch.object(time, "time", lambda: now() + AHEAD_SECONDS))
            clock = functools.partial(clock_offsets, clock=time.time)
            stack.enter_context(patch.object(preflight, "clock_offsets", clock))
        elif what == "folder":
            before = Path.cwd()
            os.chdir(place)
            stack.callback(os.chdir, before)
        yield


def here_of(holder):
    return type(holder)(**{**vars(holder), "host": "elsewhere", "machine": "another boot"})


def compare(file, words, odd_words, what, place):
    """Compare four ranks, of which one is odd; return what each rank is told."""
    is_odd = dist.get_rank() == ODD
    recipe, tree = load_recipe(Path(file), [*words, *(odd_words if is_odd else [])])
    hold = functools.partial(held_folder, Path(recipe.folder), tree, resume=True, stop=StopFlag())
    with planted(what if is_odd else None, place), patch.object(preflight, "_SEEN_SECONDS", 0.2):
        try:
            with held_by_first(hold):
                found = preflight.compare_ranks(recipe, tree, CPU, resume=True)
        except ConfigError as fault:
            return str(fault)
    return {"contents": dict(found.contents), "warnings": list(found.warnings), "clocks": dict(found.clocks)}


def with_a_byte_flipped(source, target, name):
    """Copy a folder and change one byte in the middle of a file of it; its digests stay as they were."""
    shutil.copytree(source, target)
    file = next(target.glob(name))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return target


@pytest.fixture(scope="module")
def copies(run, tmp_path_factory):
    """Make what the odd rank has in the place of what the others have; return where."""
    folder, there = run.parent, tmp_path_factory.mktemp("odd")
    source = Path(rank_facts.__file__).parents[1]
    shutil.copytree(source, there / "same code", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(there / "same code", there / "code")
    (there / "code/losses/kl.py").write_text((source / "losses/kl.py").read_text() + "\n")
    shutil.copytree(folder / "data/train", there / "same data")
    with_a_byte_flipped(folder / "data/train", there / "data", "*.bin")
    with_a_byte_flipped(folder / "student", there / "student", "*.safetensors")
    with_a_byte_flipped(folder / "teacher", there / "teacher", "*.safetensors")
    shutil.copytree(folder / "own", there / "own")
    words = json.loads((there / "own/tokenizer_config.json").read_text())
    (there / "own/tokenizer_config.json").write_text(json.dumps(words | {"x": 1}))
    (there / "elsewhere").mkdir()
    return there


@pytest.mark.parametrize(
    ("odd_words", "what", "place", "said"),
    [
        (
            [],
            "code",
            "code",
            r"code \(losses/kl\.py\): differs between ranks: rank 2 \(host \S+\): \w{16}; ranks 0-1, 3",
        ),
        (["optimizer.learning_rate=0.02"], None, "", r"optimizer\.learning_rate: 0\.01 -> 0\.02"),
        (["teachers.moe.layout.expert=2"], None, "", r"recipe: .*teachers\.moe\.layout\.expert: 4 -> 2"),
        (["folder={there}/run"], None, "", r"recipe: ranks were started with .*rank 2 .*folder: '"),
        (
            ["data.train={there}/data"],
            None,
            "",
            r"data\.train \(\S+\.bin\): differs between ranks: rank 2 .*copy the folder",
        ),
        (["student.folder={there}/student"], None, "", r"student\.folder \(model\.safetensors\): differs "),
        (
            ["teachers.moe.folder={there}/teacher"],
            None,
            "",
            r"teachers\.moe\.folder \(model\.safetensors\): d",
        ),
        (
            ["teachers.own.folder={there}/own"],
            None,
            "",
            r"teachers\.own\.folder \(tokenizer_config\.json\): ",
        ),
        (
            ["data.held_out={there}/gone", "teachers.moe.folder={there}/teacher"],
            None,
            "",
            r"2 faults .*\n- data\.held_out: .*rank 2 .*cannot be read .*\n- teachers\.moe\.folder \(",
        ),
        ([], "versions", "", r"torch: differs between ranks: rank 2 \(host \S+\): 2\.5\.0; ranks 0-1, 3 "),
        ([], "disk", "", r"folder: .*100 kB are free, one checkpoint takes about 511 kB; make room"),
        ([], "folder", "elsewhere", r"folder: run: rank 2 \(host \S+\) do not see there what rank 0 "),
    ],
    ids=str,
)
def test_a_rank_that_differs_ends_all_with_one_message(
    pool, run, copies, odd_words, what, place, said, monkeypatch
):
    words = [*PAIR_ON_FOUR, *(["folder=run"] if what == "folder" else [])]
    odd = [word.format(there=copies) for word in odd_words]
    answers = pool(4).run(compare, str(run), words, odd, what, str(copies / place))
    assert len(set(map(str, answers))) == 1
    assert isinstance(answers[0], str), answers[0]
    assert re.search(f"(?s){said}", answers[0]), answers[0]
    assert not (run.parent / "run").exists()


def test_copies_that_hold_the_same_are_let_pass_and_clocks_warned_of(pool, run, copies):
    odd = [f"data.train={copies}/same data"]
    first, *others = pool(4).run(compare, str(run), [*PAIR_ON_FOUR], odd, "code", str(copies / "same code"))
    assert others == [first] * 3
    assert set(first["contents"]) == {
        *("code", "data.train", "data.held_out", "student.folder"),
        *(f"teachers.{name}.folder" for name in ("moe", "own", "dense")),
    }
    assert first["warnings"] == []
    assert first["clocks"] == {}  # one machine
    first, *others = pool(4).run(compare, str(run), [*PAIR_ON_FOUR], [], "machine", "")
    assert others == [first] * 3
    (warning,) = first["warnings"]
    assert warning.startswith("clock: rank 2 (host elsewhere) is 100.0 s ahead of rank 0 (host ")
    assert abs(first["clocks"][ODD].seconds - AHEAD_SECONDS) < 0.5
    assert first["clocks"][ODD].within < 0.5


def count_reads(file):
    """Return how many folders this rank reads."""
    recipe, tree = load_recipe(Path(file), PAIR_ON_FOUR)
    facts = gather_objects(rank_facts.facts_here(recipe, tree, CPU, resume=True))
    with patch.object(rank_facts, "_tried", wraps=rank_facts._tried) as tried:
        rank_facts.contents(recipe, facts)
    return tried.call_count


def test_each_copy_is_read_once_and_ranks_of_a_machine_share_the_reading(pool, run):
    assert sorted(pool(4).run(count_reads, str(run))) == [1, 2, 2, 2]  # code, two of data, four models


def measure(file):
    """Set a run up on four ranks and measure it; then with weights that one rank holds otherwise."""
    recipe, tree = load_recipe(Path(file), PAIR_ON_FOUR)
    compared = preflight.compare_ranks(recipe, tree, CPU, resume=True)
    setup = set_up(recipe, CPU)
    found = as_json(preflight.measure_ranks(recipe, setup, CPU, compared))
    faults = []
    for model, name in ((setup.run.student.model, "norm"), (setup.run.teachers["own"].model, "norm")):
        weight = next(parameter for key, parameter in model.named_parameters() if name in key)
        with torch.no_grad():
            weight[3] += float(dist.get_rank() == ODD)
            try:
                preflight.measure_ranks(recipe, setup, CPU, compared)
            except TideError as fault:
                faults.append(str(fault))
            weight[3] -= float(dist.get_rank() == ODD)
    return found, faults


def test_groups_are_measured_and_equal_parts_compared(pool, run):
    answers = pool(4).run(measure, str(run))
    found, faults = answers[0]
    assert [own for _, own in answers] == [faults] * 4
    kinds = {name: kind for kind in found["groups"] for name in kind["names"]}
    assert kinds["all ranks"]["groups"] == kinds["moe experts"]["groups"] == [[0, 1, 2, 3]]
    assert kinds["dense tensor"]["groups"] == kinds["own experts"]["groups"] == [[0, 1], [2, 3]]
    assert kinds["dense pipeline"]["groups"] == [[0, 2], [1, 3]]
    assert all(
        len(seconds) == len(kind["groups"]) and min(seconds) > 0
        for kind in found["groups"]
        for seconds in kind["seconds"].values()
    )
    assert len(found["neighbour_seconds"]) == 4
    assert min(found["neighbour_seconds"]) > 0
    assert [len(part["ranks"]) for part in found["shards"]["student"]] == [4]
    assert [part["ranks"] for part in found["shards"]["teachers.own"]] == [[0, 2], [1, 3]]
    assert [part["ranks"] for part in found["shards"]["teachers.dense"]] == [[0], [1], [2], [3]]
    first, second = faults
    assert first.startswith("student.folder: weights in memory: differs between ranks: rank 2 (host ")
    assert "; ranks 0-1, 3 (host " in first
    assert second.startswith("teachers.own.folder: weights in memory: differs between ranks: rank ")


def test_only_the_preflight_leaves_the_run_folder_as_it_was(run):
    folder = run.parent / "run"
    words = ["steps=1", *PAIR_ON_FOUR[-2:]]
    found = api.preflight(run, words, ranks=2)
    assert (found["ranks"], len(found["groups"]), folder.exists()) == (2, 1, False)
    api.train(run, words, ranks=2)
    stored = sum(path.stat().st_size for path in folder.glob("checkpoints/step-*/*.distcp"))
    assert found["checkpoint_bytes"] < stored < 1.5 * found["checkpoint_bytes"]  # of so small a one
    before = {path: digest_of(path) for path in folder.rglob("*") if path.is_file()}
    written = json.loads((folder / "preflight.json").read_text())
    assert written["contents"] == found["contents"]
    assert set(written) == set(found)
    assert api.preflight(run, [*words, "steps=2", "preflight.links=false"], ranks=2)["groups"] == []
    with pytest.raises(TideError, match="holds the run of another recipe"):
        api.preflight(run, [*words, "seed=9"], ranks=2)
    assert {path: digest_of(path) for path in folder.rglob("*") if path.is_file()} == before
