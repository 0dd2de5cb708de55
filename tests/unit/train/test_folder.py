"""The run folder: whose it is, when it is taken, and that nothing of somebody else's is touched."""

import json
import os
import random
import time

import pytest
import yaml

from tests.tiny_run import recipe_tree
from tide_megatron.base.errors import CheckpointError, ConfigError
from tide_megatron.base.stop import StopFlag
from tide_megatron.train.folder import (
    check_folder,
    claim_folder,
    finished_result,
    has_same_paths,
    held_folder,
    write_recipe,
    write_result,
    write_stopped,
)
from tide_megatron.train.resolve import build_recipe


@pytest.fixture
def tree(tmp_path):
    return build_recipe(recipe_tree(tmp_path))[1]


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def take(folder, tree, *, resume=True):
    check_folder(folder, tree, resume=resume)
    claim_folder(folder, tree, resume=resume)
    write_recipe(folder, tree)


def elsewhere(tree, **more):
    """Return the recipe of a run whose folders were moved."""
    student = {**tree["student"], "folder": "moved/student"}
    return {**tree, "student": student, "data": {"train": "moved/data", "held_out": None}, **more}


def test_looking_at_a_new_folder_makes_nothing_and_taking_it_writes_the_recipe(tmp_path, tree):
    folder = tmp_path / "runs/one"
    check_folder(folder, tree, resume=True)
    assert not (tmp_path / "runs").exists()
    claim_folder(folder, tree, resume=True)
    assert yaml.safe_load((folder / "recipe.yaml").read_text()) == tree
    assert list(everything(tmp_path / "runs")) == [(folder / "recipe.yaml").relative_to(tmp_path / "runs")]


def test_the_same_recipe_goes_on_and_may_choose_machines_anew(tmp_path, tree):
    take(tmp_path / "run", tree)
    (tmp_path / "run/checkpoints").mkdir()
    (tmp_path / "run/checkpoints/latest").write_text("step-1")
    again = {**tree, "device": "auto", "batch": {**tree["batch"], "microbatch": 1}}
    take(tmp_path / "run", again)
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-1"
    assert yaml.safe_load((tmp_path / "run/recipe.yaml").read_text()) == again


def test_a_run_that_goes_on_is_not_stopped_any_more(tmp_path, tree):
    take(tmp_path / "run", tree)
    write_stopped(tmp_path / "run", {"step": 3, "consumed": 24, "skipped": 0}, "SIGTERM")
    told = json.loads((tmp_path / "run/stopped.json").read_text())
    assert (told["reason"], told["clock"]["step"]) == ("SIGTERM", 3)
    assert time.strptime(told["at"], "%Y-%m-%dT%H:%M:%S%z")
    take(tmp_path / "run", tree)
    assert not (tmp_path / "run/stopped.json").exists()


def test_the_run_of_another_recipe_is_refused_with_the_keys_that_differ(tmp_path, tree):
    take(tmp_path / "run", tree)
    before = everything(tmp_path)
    other = {**tree, "seed": 5, "device": "auto", "data": {**tree["data"], "train": "elsewhere"}}
    with pytest.raises(CheckpointError) as caught:
        check_folder(tmp_path / "run", other, resume=True)
    assert str(caught.value).splitlines() == [
        f"folder: {tmp_path / 'run'} holds the run of another recipe:",
        f"  data.train: {tree['data']['train']!r} -> 'elsewhere'",
        "  seed: 3 -> 5",
        "use another folder=, the old values, or --fresh to discard the old run",
    ]
    assert everything(tmp_path) == before


def test_a_folder_that_was_claimed_keeps_its_recipe_until_the_checkpoint_was_compared(tmp_path, tree):
    take(tmp_path / "run", tree)
    claim_folder(tmp_path / "run", {**tree, "device": "auto"}, resume=True)
    assert yaml.safe_load((tmp_path / "run/recipe.yaml").read_text()) == tree
    claim_folder(tmp_path / "run", {**tree, "device": "auto"}, resume=False)
    assert yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())["device"] == "auto"


def test_other_paths_are_left_to_the_checkpoint_which_knows_what_lay_there(tmp_path, tree):
    take(tmp_path / "run", tree)
    with pytest.raises(
        CheckpointError, match=r"another recipe:\n  data.held_out: .* -> None\n  data.train: "
    ):
        check_folder(tmp_path / "run", elsewhere(tree), resume=True)
    (tmp_path / "run/checkpoints/step-00000001-000000000008").mkdir(parents=True)
    check_folder(tmp_path / "run", elsewhere(tree), resume=True)
    assert has_same_paths(tmp_path / "run", tree)
    assert not has_same_paths(tmp_path / "run", elsewhere(tree))
    with pytest.raises(CheckpointError) as caught:
        check_folder(tmp_path / "run", elsewhere(tree, seed=5), resume=True)
    keys = [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:-1]]
    assert keys == ["data.held_out", "data.train", "seed", "student.folder"]


@pytest.mark.parametrize(("steps", "is_fine"), [(4, True), (5, True), (400, True), (3, False), (1, False)])
def test_steps_may_be_raised_and_not_lowered(tmp_path, tree, steps, is_fine):
    take(tmp_path / "run", tree)
    if is_fine:
        check_folder(tmp_path / "run", {**tree, "steps": steps}, resume=True)
    else:
        with pytest.raises(CheckpointError, match=rf"another recipe:\n  steps: 4 -> {steps}\n"):
            check_folder(tmp_path / "run", {**tree, "steps": steps}, resume=True)


DONE = {"finished": True, "clock": {"step": 4}, "nll_per_byte": 1.0}


@pytest.mark.parametrize(
    ("result", "steps", "is_over"),
    [
        (DONE, 4, True),
        (DONE, 5, False),  # raised
        (DONE | {"finished": False}, 4, False),
        ({"seconds": 1.0}, 4, False),
        ([], 4, False),
        (None, 4, False),
    ],
)
def test_a_run_is_over_when_its_result_says_so_and_its_student_is_there(
    tmp_path, tree, result, steps, is_over
):
    if result is not None:
        write_result(tmp_path, result)
    assert finished_result(tmp_path, {**tree, "steps": steps}) is None, "no student"
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    assert finished_result(tmp_path, {**tree, "steps": steps}) == (result if is_over else None)
    (tmp_path / "result.json").write_text("{")
    assert finished_result(tmp_path, tree) is None


@pytest.mark.parametrize("content", ["", "- 1", "seed: 3", "a: [", "student: 3\nteachers: 4\nbatch: 5"])
def test_a_damaged_recipe_in_the_folder_is_refused(tmp_path, tree, content):
    take(tmp_path / "run", tree)
    (tmp_path / "run/recipe.yaml").write_text(content)
    with pytest.raises(
        CheckpointError, match=r"another recipe:\n  recipe.yaml cannot be read as one\n.*--fresh"
    ):
        check_folder(tmp_path / "run", tree, resume=True)


def test_fresh_discards_what_runs_leave_and_nothing_else(tmp_path, tree):
    take(tmp_path / "run", tree)
    for name in (
        "checkpoints/step-1/x",
        "model/config.json",
        "tensorboard/events",
        "wandb/run/x",
        "mine/notes",
    ):
        (tmp_path / "run" / name).parent.mkdir(parents=True)
        (tmp_path / "run" / name).write_text("x")
    for name in ("metrics.jsonl", "result.json", "stopped.json", "notes.txt"):
        (tmp_path / "run" / name).write_text("x")
    other = {**tree, "seed": 5}
    check_folder(tmp_path / "run", other, resume=False)
    assert len(everything(tmp_path / "run")) == 10, "looking discards nothing"
    claim_folder(tmp_path / "run", other, resume=False)
    assert sorted(map(str, everything(tmp_path / "run"))) == ["mine/notes", "notes.txt", "recipe.yaml"]


def start_small_run(folder, tree, offset, *, resume):
    """Start a process that does to a folder what a run does, without a model; return its pid."""
    pid = os.fork()
    if pid:
        return pid
    code, mine, looked = 1, str(os.getpid()), folder.with_suffix(".refused")
    try:
        time.sleep(offset)
        with held_folder(folder, tree, resume=resume, stop=StopFlag()) as lease:
            time.sleep(0.02)
            claim_folder(folder, tree, resume=resume)
            for step in range(4):
                partial = folder / f"checkpoints/step-{step}.partial"
                partial.mkdir(parents=True)
                (partial / "weights").write_text(mine)
                time.sleep(0.02)
                lease.check()
                partial.rename(folder / f"checkpoints/step-{step}-{mine}")
                with (folder / "metrics.jsonl").open("a") as stream:
                    stream.write(f"{mine}\n")
            write_result(folder, {"pid": mine})
            for _ in range(1000):  # until the other one has looked
                time.sleep(0.03 * (not looked.exists()))
        code = 0
    except ConfigError:
        code = 2
        looked.touch()
    finally:
        os._exit(code)


@pytest.mark.parametrize("starts", [4, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("resume", [True, False])
def test_of_two_starts_of_a_run_exactly_one_proceeds_and_nothing_is_damaged(tmp_path, tree, resume, starts):
    draw = random.Random(7)
    for number in range(starts):
        folder = tmp_path / f"run{number}"
        if number % 2:
            take(folder, tree)
        pids = [start_small_run(folder, tree, draw.uniform(0, 0.25), resume=resume) for _ in range(2)]
        codes = {pid: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids}
        assert sorted(codes.values()) == [0, 2]
        winner = str(next(pid for pid, code in codes.items() if code == 0))
        assert (folder / "metrics.jsonl").read_text().split() == [winner] * 4
        assert json.loads((folder / "result.json").read_text()) == {"pid": winner}
        weights = {(path.parent.name, path.read_text()) for path in folder.glob("checkpoints/*/weights")}
        assert weights == {(f"step-{step}-{winner}", winner) for step in range(4)}
        assert yaml.safe_load((folder / "recipe.yaml").read_text()) == tree
        assert {path.name for path in folder.iterdir()} == {
            "recipe.yaml",
            "checkpoints",
            "metrics.jsonl",
            "result.json",
        }


def test_a_folder_that_a_run_only_looked_at_is_gone_with_those_made_for_it(tmp_path, tree):
    with held_folder(tmp_path / "a/b/run", tree, resume=True, stop=StopFlag()):
        assert (tmp_path / "a/b/run").is_dir()
    assert not (tmp_path / "a").exists()


def test_fresh_unlinks_what_leads_elsewhere(tmp_path, tree):
    take(tmp_path / "run", tree)
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch/kept").write_text("x")
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "scratch")
    (tmp_path / "run/model").symlink_to("nowhere")
    (tmp_path / "run/result.json").symlink_to("result.json")
    take(tmp_path / "run", tree, resume=False)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["recipe.yaml"]
    assert (tmp_path / "scratch/kept").read_text() == "x"


@pytest.mark.parametrize("name", ["m" * 300, "m" * 300 + "/run", "file/run"])
def test_a_name_that_no_folder_can_have_is_one_line(tmp_path, tree, name):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"^(folder: )?[^\n]*cannot be (used|written)[^\n]*choose [^\n]*$"):
        check_folder(tmp_path / name, tree, resume=True)


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("name", ["model", "checkpoints", "result.json"])
def test_files_under_our_names_that_no_run_wrote_are_not_touched(tmp_path, tree, name, resume):
    (tmp_path / "mine" / name).mkdir(parents=True)
    with pytest.raises(
        ConfigError, match=rf"^folder: .*mine holds {name} but no recipe\.yaml.*; choose another"
    ):
        check_folder(tmp_path / "mine", tree, resume=resume)
    assert (tmp_path / "mine" / name).is_dir()


def test_places_where_no_folder_can_be_are_refused(tmp_path, tree):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file/run/one"):
        with pytest.raises(
            ConfigError, match=rf"^folder: {folder} cannot be used: .*file .*; choose another"
        ):
            check_folder(folder, tree, resume=True)
        with pytest.raises(ConfigError, match=rf"^{folder}: cannot be written .*; choose another"):
            claim_folder(folder, tree, resume=True)
    assert (tmp_path / "file").read_text() == "x"


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path, tree, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests may run as root, who may write everywhere
    with pytest.raises(ConfigError, match=rf"^folder: .*run cannot be used: {tmp_path} cannot be written to"):
        check_folder(tmp_path / "run", tree, resume=True)


def test_a_result_replaces_the_old_one_whole(tmp_path):
    write_result(tmp_path, {"seconds": 1.0})
    write_result(tmp_path, {"seconds": 2.0})
    assert json.loads((tmp_path / "result.json").read_text()) == {"seconds": 2.0}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
