"""A run that was stopped and started anew goes on bit for bit, and on other ranks and layouts to 1e-5."""

import json
import shutil

from tide_megatron.platform.distributed import seed_all

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.tiny_run import PAIR_ON_FOUR, write_cross_run, write_pair_run, write_tiny_run
from tide_megatron.base.device import choose_device
from tide_megatron.base.errors import CheckpointError
from tide_megatron.base.stop import StopFlag, Stopped
from tide_megatron.checkpoint.metadata import read_metadata
from tide_megatron.checkpoint.retention import Mark, listed
from tide_megatron.train.loop import train
from tide_megatron.train.resolve import load_recipe

STEPS = 8  # of 8 samples over a data set of 40: the fifth update ends the epoch

BLENDED = (
    "data.train=null",
    "data.blend.few={{folder: {}/data/train, samples: 5, weight: 1}}",
    "data.blend.all={{folder: {}/data/train, weight: 1}}",
)
"""Words of a blend, into which the run's folder is to be written."""


class StopAfter(StopFlag):
    """A stop flag that is raised by the clock's own test: after so many polls."""

    def __init__(self, polls):
        super().__init__()
        self.polls = polls

    @property
    def requested(self):
        self.polls -= 1
        if self.polls < 0:
            self.request("the test")
        return self.reason is not None


def run(recipe_file, folder, expert, stop_after, global_seed, words=()):
    """Train on this rank until the end or the stop; return the result."""
    overrides = [
        f"folder={folder}",
        f"teachers.moe.layout.expert={expert}",
        f"steps={STEPS}",
        "batch.samples=8",
    ]
    overrides += ["metrics.every=1", "metrics.tensorboard=false", *words]
    recipe, tree = load_recipe(recipe_file, overrides)
    seed_all(global_seed)
    return train(recipe, tree, True, device=choose_device("cpu"), stop=StopAfter(stop_after))


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if "loss" in line}


@pytest.mark.parametrize(
    ("ranks", "words", "write"),
    [
        (1, (), write_tiny_run),
        (2, (), write_tiny_run),
        (2, ("student.precision=bf16",), write_tiny_run),
        (2, ("optimizer.distributed=false", "checkpoints.asynchronous=false"), write_tiny_run),
        (2, ("teachers.own.layout.expert=2",), write_cross_run),
        (2, (*BLENDED, "teachers.own.sources=[few]", "batch.tokens=200"), write_cross_run),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(pool, tmp_path, ranks, words, write):
    tiny, words = write(tmp_path / "tiny"), [word.format(tmp_path / "tiny") for word in words]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    pool(ranks).run(run, tiny, whole, ranks, 1000, 1, words)
    first = pool(ranks).run(run, tiny, parted, ranks, 3, 1, words)[0]
    assert not first["finished"]
    assert first["clock"]["step"] == 4
    assert (parted / "stopped.json").exists()
    second = pool(ranks).run(run, tiny, parted, ranks, 1000, 999, words)[0]
    assert second["finished"]
    assert not (parted / "stopped.json").exists()
    assert losses(parted) == losses(whole)
    assert len(losses(whole)) == STEPS
    wanted, got = load_file(whole / "model/model.safetensors"), load_file(parted / "model/model.safetensors")
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def run_stopped(recipe_file, folder, asked, words=(), resume=True):
    """Train on this rank, which was asked to stop while it started, or was not; return what came of it."""
    words = [f"folder={folder}", f"steps={STEPS}", "batch.samples=8", "metrics.tensorboard=false", *words]
    recipe, tree = load_recipe(recipe_file, words)
    stop = StopFlag()
    if dist.get_rank() in asked:
        stop.request("SIGTERM")
    try:
        train(recipe, tree, resume, device=choose_device("cpu"), stop=stop)
    except Stopped as end:
        return str(end)
    return None


@pytest.mark.parametrize("asked", [(0, 1), (0,), (1,)])
def test_a_stop_before_the_first_step_leaves_everything_as_it_was(pool, tmp_path, asked):
    tiny = write_tiny_run(tmp_path / "tiny")
    said = ["stopped by SIGTERM" if rank in asked else "stopped by another rank" for rank in (0, 1)]
    assert pool(2).run(run_stopped, tiny, tmp_path / "runs/new", asked) == said
    assert not (tmp_path / "runs").exists()
    pool(2).run(run, tiny, tmp_path / "old", 2, 0, 1)
    stopped = json.loads((tmp_path / "old/stopped.json").read_text())
    assert (stopped["reason"], stopped["clock"]["step"]) == ("the test", 1)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "old").rglob("*")}
    assert len(before) > 3
    for words, resume in ([(), True], [("seed=77",), False]):
        assert pool(2).run(run_stopped, tiny, tmp_path / "old", asked, words, resume) == said
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "old").rglob("*")} == before


@pytest.fixture(scope="module")
def pair(pool, tmp_path_factory):
    """Return a recipe with three teachers, its whole run on two ranks, and one that was stopped halfway."""
    folder = tmp_path_factory.mktemp("pair")
    tiny, whole, stopped = write_pair_run(folder / "tiny"), folder / "whole", folder / "stopped"
    on_two = ("teachers.own.layout.expert=2", "teachers.dense.layout.pipeline=2")
    pool(2).run(run, tiny, whole, 2, 1000, 1, on_two)
    pool(2).run(run, tiny, stopped, 2, 3, 1, on_two)
    return tiny, whole, stopped


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (1, ("batch.microbatch=2",)),
        (2, ("teachers.dense.layout.tensor=2", "batch.microbatch=1")),
        (4, PAIR_ON_FOUR),
    ],
)
def test_other_ranks_layouts_and_accumulation_go_on_with_the_same_stream(pool, pair, tmp_path, ranks, words):
    """Saved on two ranks, in one microbatch, the mixtures over two ranks and the dense one in two stages."""
    tiny, whole, stopped = pair
    parted = shutil.copytree(stopped, tmp_path / "parted")
    pool(ranks).run(run, tiny, parted, ranks, 1000, 7, words)
    wanted, got = losses(whole), losses(parted)
    assert wanted.keys() == got.keys() == set(range(1, STEPS + 1))
    for step in wanted:
        assert got[step] == pytest.approx(wanted[step], rel=1e-5), f"step {step}"
    both = [read_metadata(listed(folder / "checkpoints")[-1]) for folder in (whole, parted)]
    assert [one.optimizer_steps for one in both] == [[STEPS], [STEPS]]
    assert both[0].clock == both[1].clock
    assert [one.ranks for one in both] == [2, ranks]


def test_another_recipe_and_nothing_whole_are_refused(pool, tmp_path):
    tiny = write_tiny_run(tmp_path / "tiny")
    folder = tmp_path / "run"
    pool(1).run(run, tiny, folder, 1, 3, 1)
    with pytest.raises(Exception, match=r"another recipe(.|\n)*seed: .* -> 5"):
        pool(1).run(run, tiny, folder, 1, 1000, 1, ("seed=5",))
    cut_shard(listed(folder / "checkpoints")[-1])
    with pytest.raises(Exception, match=f"{CheckpointError.__name__}(.|\n)*none of its checkpoints is whole"):
        pool(1).run(run, tiny, folder, 1, 1000, 1)


def cut_shard(checkpoint):
    shard = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def test_a_damaged_checkpoint_costs_one_interval_and_nothing_else(pool, tmp_path):
    tiny = write_tiny_run(tmp_path / "tiny")
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    pool(2).run(run, tiny, whole, 2, 1000, 1)
    pool(2).run(run, tiny, parted, 2, 5, 1, ("checkpoints.every=2",))
    checkpoints = parted / "checkpoints"
    assert [path.name for path in listed(checkpoints)] == [
        "step-00000004-000000000032",
        "step-00000006-000000000048",
    ]
    cut_shard(listed(checkpoints)[-1])
    pool(2).run(run, tiny, parted, 2, 1000, 5, ("checkpoints.every=2", "checkpoints.keep_every=2"))
    lines = [json.loads(line) for line in (parted / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == list(range(1, STEPS + 1)), "steps that were done again stand once in the history"
    assert losses(parted) == losses(whole)
    assert [path.name[:13] for path in listed(checkpoints)] == [
        "step-00000004",
        "step-00000006",
        "step-00000008",
    ]
    assert (checkpoints / "step-00000006-000000000048.damaged").is_dir()


def test_a_disk_that_refuses_ends_all_ranks_with_one_message(pool, tmp_path):
    tiny = write_tiny_run(tmp_path / "tiny")
    folder = tmp_path / "run"
    pool(2).run(run, tiny, folder, 2, 0, 1)
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").write_text("in the way")
    with pytest.raises(
        Exception, match=r"rank 0(.|\n)*cannot be written \((.|\n)*rank 1(.|\n)*cannot be written \("
    ):
        pool(2).run(run, tiny, folder, 2, 1, 1)


def test_ranks_keep_the_best_are_profiled_and_branch_together(pool, tmp_path):
    tiny, own = write_tiny_run(tmp_path / "tiny"), tmp_path / "own"
    words = ["evaluation.every=1", "checkpoints.keep=1", "checkpoints.keep_best=nll_per_byte"]
    words += ["metrics.profile=[2,2]", "optimizer.learning_rate=1.0", "optimizer.warmup=0.0", "steps=3"]
    first = pool(2).run(run, tiny, own, 2, 1000, 1, words)
    kept, best = listed(own / "checkpoints"), (own / "checkpoints/best").read_text().strip()
    assert [Mark.of(path).step for path in kept] == [1, 3], "so large steps make it worse"
    assert kept[0].name == best
    assert len(list(own.glob("profile*"))) == 1
    branch = ["optimizer.learning_rate=1e-9", "steps=1", f"branch.folder={own}"]
    for name, more in (("with", []), ("without", ["branch.optimizer=false"])):
        found = pool(2).run(run, tiny, tmp_path / name, 2, 1000, 1, [*branch, *more])
        assert found[0]["branch"].startswith("step 3 of recipe ")
        assert found[0]["nll_per_byte"] == pytest.approx(first[0]["nll_per_byte"], rel=1e-4)
        assert {each["clock"]["step"] for each in found} == {1}
